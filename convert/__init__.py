"""Other people's files: HF, bitsandbytes and PEFT directories, in and out."""
