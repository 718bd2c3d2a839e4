"""How large a kernel's tiles are: integer constraints from the machine's limits, solved in well under a millisecond.

propose() gives the preferred tile of a problem, enumerate_tiles() all feasible ones. Runs no kernel, measures nothing.
"""

from unspool_kernels.tiles.cpu import CpuPackedProduct, CpuRowKernel
from unspool_kernels.tiles.gpu import GpuChunkKernel, GpuRingAttention, GpuRowKernel
from unspool_kernels.tiles.limits import SM_80, SM_90, CpuLimits, GpuLimits
from unspool_kernels.tiles.proposals import Tile, TileProblem, enumerate_tiles, propose
from unspool_kernels.tiles.solver import Infeasible

__all__ = [
    "SM_80",
    "SM_90",
    "CpuLimits",
    "CpuPackedProduct",
    "CpuRowKernel",
    "GpuChunkKernel",
    "GpuLimits",
    "GpuRingAttention",
    "GpuRowKernel",
    "Infeasible",
    "Tile",
    "TileProblem",
    "enumerate_tiles",
    "propose",
]
