"""The command `finetune`: from a finished model and a folder of pictures to a fine-tuned model."""
