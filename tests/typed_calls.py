"""Calls that a type checker must accept, and calls that it must not: ``test_typing.py`` runs it over this file."""

import torch
from torch import Tensor

import harmonic_triton as ht
from harmonic_triton import CrossEntropyStats, HarmonicStats

x, w, target = torch.randn(4, 8), torch.randn(9, 8), torch.randint(9, (4,))

loss: Tensor = ht.linear_harmonic_loss(x, w, target)
loss = ht.linear_harmonic_loss(x, w, target, n=8.0, eps=1e-4, uniform_mix=0.01, reduction="sum", backend="torch")
loss = ht.linear_harmonic_loss(x, w, target, n=torch.tensor(8.0), class_weight=torch.ones(9), num_items=3, shift=2)
loss = ht.linear_cross_entropy(x, w, target, z_loss=1e-4, label_smoothing=0.1, ignore_index=-1)
pair: tuple[Tensor, HarmonicStats] = ht.linear_harmonic_loss(x, w, target, return_stats=True, n=8.0)
other: tuple[Tensor, CrossEntropyStats] = ht.linear_cross_entropy(x, w, target, return_stats=True)
loss = ht.linear_cross_entropy(x, w, target, bias=torch.zeros(9), softcap=30.0, token_scaling=True, return_lse=False)
both: tuple[Tensor, Tensor] = ht.linear_cross_entropy(x, w, target, return_lse=True)
triple: tuple[Tensor, CrossEntropyStats, Tensor]
triple = ht.linear_cross_entropy(x, w, target, return_stats=True, return_lse=True, softcap=None)
head = ht.HarmonicHead(8, 9, n=8.0, uniform_mix=0.01, reduction="none", return_stats=True)
result = head(x, target=target, reduction="mean")
module = ht.LinearHarmonicLoss(n=8.0, shift=True)

loss = ht.linear_harmonic_loss(x, w, target, reducton="mean")  # WRONG: a misspelt option
loss = ht.linear_harmonic_loss(x, w, target, reduction="average")  # WRONG: an unknown reduction
loss = ht.linear_harmonic_loss(x, w, target, backend="cuda")  # WRONG: an unknown backend
loss = ht.linear_harmonic_loss(x, w, target, n="28")  # WRONG: an exponent that is no number
loss = ht.linear_harmonic_loss(x, w, target, z_loss=1e-4)  # WRONG: cross-entropy's alone
loss = ht.linear_cross_entropy(x, w, target, n=8.0)  # WRONG: the harmonic loss's alone
loss = ht.linear_cross_entropy(x, w, target, bias=False)  # WRONG: no switch
loss = ht.linear_cross_entropy(x, w, target, return_lse=True)  # WRONG: a pair
loss = ht.linear_harmonic_loss(x, w, target, softcap=30.0)  # WRONG: cross-entropy's alone
loss = ht.linear_cross_entropy(x, w, target, 1e-4)  # WRONG: options by position
loss = ht.linear_harmonic_loss(x, w, target, return_stats=True)  # WRONG: a pair
loss = ht.linear_harmonic_loss(x, w)  # WRONG: no target
head = ht.HarmonicHead(8, 9, bias=True)  # WRONG: distances have no bias
head = ht.HarmonicHead(8, 9, memory_budget="1 GB")  # WRONG: bytes are a number
module = ht.LinearHarmonicLoss(smoothing=0.1)  # WRONG: an unknown option
