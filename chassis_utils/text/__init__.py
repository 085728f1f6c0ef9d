"""What the models read: natural text that every installation has, and the prompt families of the studies."""
