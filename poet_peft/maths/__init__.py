"""The mathematics of rotations: plain functions and small objects over tensors, which know nothing of modules or PEFT.

`orthogonal` maps skew-symmetric matrices to orthogonal ones, `blocks` cuts the features of a side into blocks, and
`spectrum` measures how orthogonal a matrix is, how far it turns, and what that does to singular values.
"""
