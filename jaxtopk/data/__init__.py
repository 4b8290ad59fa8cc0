"""What goes into a model: downloaded assets, tokenizers, chat templates and text corpora."""
