"""What is asked: batches and targets in, losses out."""
