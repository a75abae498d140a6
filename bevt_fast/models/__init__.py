"""What answers: the encoder, the pretraining model, the classifier, and the table of official names."""
