"""What scores and costs recipes and evaluation commands report."""
