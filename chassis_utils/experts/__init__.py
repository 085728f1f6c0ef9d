"""What a base is made to follow: each expert gives next-token logits over the base's vocabulary."""
