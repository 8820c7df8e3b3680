"""What a rotated linear layer computes.

`reference` is the specification. `paths` chooses between it and the faster ways, by cost: `input_centric` rotates
activations; `effective` computes with the weight `R W P`. Its gradients of the rotations come from one of two rules,
"tangent" and "weight_centric", in `block_gradients`. `sides` holds the rotation of one side, and the blocks that
follow from its parameters.
"""
