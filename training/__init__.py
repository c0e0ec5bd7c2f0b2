"""GPT-1's pre-training, each program a visible loop and a command line."""
