"""Attention: softmax(q kᵀ · softmax_scale + …) v and its gradients, the score matrix never in memory."""
