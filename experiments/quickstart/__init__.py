"""What does exact Top-k decoding cost a real pretrained model, at each share of keys kept?"""
