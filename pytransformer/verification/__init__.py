"""Correctness on this machine: the accuracy contract, and the matrix of op × dtype × backend that `pytransformer verify` prints."""

from pytransformer.verification.contract import LIMITS, SEEDS, Contract, ContractError, Errors, Limits, limits_for
from pytransformer.verification.matrix import Cell, Outcome, measure, plan, prepare_triton, run_matrix

__all__ = [
    "LIMITS",
    "SEEDS",
    "Cell",
    "Contract",
    "ContractError",
    "Errors",
    "Limits",
    "Outcome",
    "limits_for",
    "measure",
    "plan",
    "prepare_triton",
    "run_matrix",
]
