"""Block-circulant and low-rank layers in place of a network's dense ones: fitted, patched in, calibrated."""
