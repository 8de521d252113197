"""What a run says about itself: a clock and counts, the model's FLOPs, and the writers of a workdir."""
