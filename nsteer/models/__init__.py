"""What is known of a model before it is loaded: its files, tokenizer, chat template and context length."""
