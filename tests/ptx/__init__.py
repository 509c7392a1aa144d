"""An executor of PTX: runs Triton kernels as compiled for sm_90, without a GPU.

The Triton interpreter runs the Python of a kernel, one program after the other, on tensors of the
host. It cannot see what the compiler made of it. This runs the PTX: `parse` reads it, `execute` runs
it on numpy, `memory` says what is wrong with an access, `launch` compiles kernels and stands in for
a CUDA device under the whole package. Test equipment; the package never imports it.

What is modelled:

- registers, predicates and control flow of every lane, also where the lanes of a warp part;
- fp32 with one rounding, `fma`, `.ftz`, `max` and `min` that drop a NaN; approximate instructions
  (`ex2`, `lg2`, `div.full` ...) rounded right, or with `Options.ulps` a few ulp off by chance;
- global memory: bounds (of the elements of a launch's tensors, not of what lies between or around
  them), alignment, poison in what nobody has written (`torch.empty` within `launch.device`);
- order: an access that is not ordered with another one's write is a race and a fault, between warps
  (shared and global memory, barriers) and between CTAs (atomics, fences, their semantics and scope),
  however the CTAs were interleaved. A plain load of what another CTA wrote in the same launch is a
  fault too, as if its L1 held an old line: stricter than PTX behind an acquire (`Options.cached`),
  but what the kernels promise;
- CTAs in teams of chance, preempted at global memory. With `Options.late` a racing or stale load is
  no fault but gives what was there before the launch: what a GPU might make of it.

What is not: time, registers and spills (`tests/aot.py` has them); what ptxas and the hardware do
below PTX; payloads of NaN; fp64, tensor cores, copies that run by themselves (`cp.async`); lanes of
a warp as threads of their own (a warp is the unit of order); grids beyond one dimension. The bits of
approximate instructions are not those of a GPU. An instruction that is not known raises
:class:`ptx.parse.Unknown`.
"""
