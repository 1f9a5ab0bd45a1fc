"""structadapt in other people's trainers. Nothing is imported until a module here is.

`peft_tuner`   the adapters as a PEFT method: PeftModel, and all that knows it, sees them
`trl`          merged weights for TRL's vLLM sync, out of place and under their original names
`callbacks`    for transformers' Trainer and its subclasses: atomic adapter checkpoints, a guard
               against gradients that are not finite
"""
