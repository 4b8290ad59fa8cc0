"""The other side of the comparison: decodes with `transformers` when told to, one line in, one line out.

Runs under a Python of its own and imports nothing of the project. Its first line of input is a JSON object
{folder, prompt, steps}; it answers with its versions when it is ready. After that each line names a kind of cache,
"dynamic" (what `generate` takes) or "static" (allocated once), and is answered with {seconds, tokens}: a greedy decode of
`steps` tokens after the prompt, batch 1, float32, in inference mode, without the bookkeeping of `generate`.
"""

import json
import sys
import time

import torch
import transformers


def main() -> None:
    """Loads, prefills both caches, and serves until the input ends."""
    transformers.logging.set_verbosity_error()
    asked = json.loads(sys.stdin.readline())
    steps, prompt = asked["steps"], torch.tensor([asked["prompt"]])
    length = prompt.shape[1]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        asked["folder"], dtype=torch.float32
    ).eval()
    with torch.inference_mode():
        caches = {
            "dynamic": transformers.DynamicCache(config=model.config),
            "static": transformers.StaticCache(config=model.config, max_cache_len=length + steps),
        }
        for cache in caches.values():
            model(prompt[:, :-1], cache=cache, logits_to_keep=1)
        say(
            {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "threads": torch.get_num_threads(),
            }
        )
        for line in sys.stdin:
            cache = caches[line.strip()]
            begin = time.perf_counter()
            token, tokens = prompt[:, -1:], []
            for _ in range(steps):
                logits = model(token, cache=cache).logits
                token = logits[:, -1].argmax(-1, keepdim=True)
                tokens.append(int(token))
            seconds = time.perf_counter() - begin
            cache.crop(-steps)
            say({"seconds": seconds, "tokens": tokens})


def say(answer: dict) -> None:
    """Writes one line."""
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
