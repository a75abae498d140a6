"""What travels: files become clips and images, clips and images become batches."""
