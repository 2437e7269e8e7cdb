"""What an answer is: a refusal, degenerate, right, unsafe. One judge a file (judge.py asks)."""
