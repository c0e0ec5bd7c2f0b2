"""GPT-1 trained, fine-tuned and analysed: each program a visible loop and a command line."""
