"""What the training recipes share. Needs the extra `train`."""
