"""dX, dW and db from chunks whose gaps have become the products' coefficients."""

from __future__ import annotations

import torch
from torch import Tensor

from harmonic_triton.fused.problem import Wanted
from harmonic_triton.fused.pytorch.chunk import Terms, columns, part
from harmonic_triton.fused.pytorch.head import Head

BLOCK_ELEMENTS = 2**19  # of class vectors: they and their gradients stay in cache for both products
MANY_TOKENS = 128  # whose products gain more from whole operands


class Gradients:
    """dX, dW and db over chunks, in the compute dtype, each only where it is asked for."""

    def __init__(self, head: Head, tokens: int, wanted: Wanted) -> None:
        none = self.none = head.w.new_empty(0, dtype=head.dtype)
        self.head, self.wanted = head, wanted
        classes, width = head.w.shape
        self.tokens, self.dx = tokens, none
        self.dw = head.w.new_empty((classes, width), dtype=head.dtype) if wanted.w else none
        self.db = head.w.new_zeros(classes, dtype=head.dtype) if wanted.bias else none
        self.first = True

    def add(self, at: Tensor | slice, x: Tensor, target: Tensor, rival: Tensor, a: Tensor, terms: Terms) -> None:
        """Add a chunk of tokens with the coefficients ``a`` (C, V); target and rival (C,) have none among them."""
        head, harmonic = self.head, self.head.harmonic
        centered = head.centered(x) if harmonic else x
        dx = torch.empty_like(x) if self.wanted.x else None
        operand, scale = centered * terms.scale, terms.scale[:, 0]
        elements = BLOCK_ELEMENTS if len(x) < MANY_TOKENS or not head.plain else 16 * BLOCK_ELEMENTS
        for i, classes in enumerate(head.blocks(elements)):
            block, a_block = head.block(classes), columns(a, classes)
            if dx is not None:
                torch.mm(a_block, block, out=dx) if i == 0 else dx.addmm_(a_block, block)
            by_class = a_block.t()
            if self.wanted.bias:
                part(self.db, classes).add_(torch.mv(by_class, scale))
            if self.wanted.w:
                dw = part(self.dw, classes)
                if harmonic:
                    column_sum = torch.mv(by_class, scale).unsqueeze(1)
                    if self.first:
                        torch.mul(block, column_sum, out=dw).addmm_(by_class, operand, beta=-1)
                    else:
                        dw.addcmul_(column_sum, block, value=-1).addmm_(by_class, operand)
                elif self.first:
                    torch.mm(by_class, operand, out=dw)
                else:
                    dw.addmm_(by_class, operand)
        self.first = False
        index = torch.cat([target, rival])
        rows = head.rows(index).view(2, *x.shape)
        moved = (x - rows if harmonic else x) * terms.direct
        if self.wanted.w:
            _subtract(self.dw, index, moved.flatten(0, 1))
        if self.wanted.bias:
            _subtract(self.db, index, terms.direct.flatten())
        if dx is None:
            return
        dx.mul_(terms.scale)
        if harmonic:
            dx.addcmul_(terms.on_x, centered)
        elif head.center is not None:
            dx.addcmul_(terms.on_center, head.center)
        if not harmonic or terms.far is not None:
            along = head.centered(rows) * -terms.direct
            moved = along if terms.far is None or not harmonic else torch.where(terms.far != 0, along, moved)
        dx.add_(moved.sum(0))
        self.store(at, dx)

    def store(self, at: Tensor | slice, dx: Tensor) -> None:
        """Put the gradient of a chunk of tokens in its place; those that no chunk has are 0."""
        if len(dx) == self.tokens:
            self.dx = dx
            return
        if not len(self.dx):
            self.dx = dx.new_zeros(self.tokens, dx.shape[1])
        if isinstance(at, slice):
            self.dx[at] = dx
        else:
            self.dx.index_copy_(0, at, dx)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """(dX, dW, db)."""
        if self.first:  # no token counts
            self.dw.zero_()
            if self.wanted.x:
                self.dx = self.dw.new_zeros(self.tokens, self.head.w.shape[1])
        return self.dx, self.dw, self.db


def _subtract(out: Tensor, index: Tensor, values: Tensor) -> None:
    """out[index] -= values, in the same order every run."""
    if out.is_cpu:
        out.index_add_(0, index, values, alpha=-1)
    else:
        out.index_put_((index,), -values, accumulate=True)  # sorts; index_add_ would use atomics
