"""A pure-PyTorch Llama 3 with named hook points in its residual stream; imports nothing else of this project.

The folder may be copied into another project. From a model of the Hugging Face Hub, or a folder, to a streamed reply:

    from llama_3.chat_format import Message, load_chat_format
    from llama_3.checkpoint import load_model
    from llama_3.generate import stream_steps
    from llama_3.hub import resolve_model
    from llama_3.sampling import Sampling
    from llama_3.tokenizer import StreamDecoder, load_tokenizer

    path = resolve_model("meta-llama/Llama-3.2-1B-Instruct")
    model, tokenizer = load_model(path), load_tokenizer(path)
    prompt, _ = load_chat_format(path, tokenizer).encode_dialog([Message("user", "Why is the sky blue?")])
    text, options = StreamDecoder(tokenizer), dict(max_tokens=200, stop_ids=tokenizer.stop_ids)
    for steps in stream_steps(model, [prompt], sampling=Sampling(), seeds=[0], **options):
        print("".join(text.push(step.token) for step in steps if step.finish != "stop"), end="", flush=True)

A hook reads or changes the stream, (rows, tokens, width), at a place (`hooks.py`); hand it over as `hooks=hooks`:

    from llama_3.hooks import HookPoint, Hooks

    hooks = Hooks()
    hooks.add(HookPoint(8, "resid_post"), lambda resid, span: resid * 1.1)
"""
