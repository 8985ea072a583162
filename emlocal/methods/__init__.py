"""What is done with several completions of one prompt: finding their answers, and voting."""
