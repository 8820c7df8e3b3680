"""One base weight of a layer, read and written as a matrix (out, in) however it is kept.

`base` has the interface, `plain` and `quantized` the kinds of it, `residual` what rounding a 16-bit weight leaves
over, `sharded` the weights that are spread over processes, and `initial` the weights to start pretraining from.
"""
