"""The fused-linear path: hidden states and head to loss and gradients, one tile of logits at a time.

What never exists: the [N, V] logits, their gradient, a copy of the head (a CPU casts half precision in
blocks; a GPU casts the head once per call, under autocast alone). Only scored rows are multiplied. A
tile holds up to R rows of fp32 logits in one fixed workspace; its forward matmul always has the same
shape, so a row's log-prob does not depend on its neighbours.

The gradient of a row of logits is c J with J = onehot - softmax and c known once the sequence's
log-ratio is. c is one number per row, so it moves to the D side of both products,

    d_hidden = c * (J W)        d_weight = Jt (c * H)        d_bias = Jt c

and nothing is computed twice. A sequence that must be complete before its c is known lies in one tile;
one that is longer than a tile is scored first, at the cost of one more matmul over its rows.

With a tolerance tau > 0 only the columns A of a tile that carry its gradient enter the two products: the
smallest set, always with the labels, whose complement holds at most tau^2 of sum c^2 J^2. What is
left out is added back as a rank-one term per cluster of similar rows, with the mass m of each row's
tail, the cluster's tail profile q = sum |c| J and the mean row mu = q W / sum q of the head in it:

    d_hidden = c * (J_A W_A + m mu)    d_weight[A] += J_At (c * H),  d_weight += qt (sum c m H / sum q)

``operators`` has the order of the work, ``plan`` puts rows into tiles, ``workspace`` and ``head`` are
the forward of a tile, ``gradient`` and ``active`` its backward. What reads and writes the logits of a
tile is an implementation's ``tile.TileKernels``.
"""
