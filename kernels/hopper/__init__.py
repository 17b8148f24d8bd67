"""Attention for Hopper (sm_90) in Gluon: warp-specialised, with copies and products that run beside the softmax."""
