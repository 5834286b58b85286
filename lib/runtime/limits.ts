// The largest sizes that the CUDA kernels take, checked at record time. The kernels check the same, when they run.
import type { DType } from './tensor.js'

type Dims = Readonly<Record<string, number>>

interface Limit {
  /** By the letters of the op table. */
  what: string
  size: (dims: Dims) => number
  most: (dims: Dims, activations: DType | undefined) => number
}

const each = (letters: string, most: number): Limit[] =>
  [...letters].map((what) => ({ what, size: (dims) => dims[what]!, most: () => most }))

/** Dimensions of a grid but the first one. */
const GRID = 65535
const INDEX = 2 ** 31 - 1

/** Rounded up to whole tiles in 32 bits. */
const product = (letters: string): Limit[] => each(letters, INDEX - 1024)
const rmsnorm: Limit[] = [...each('N', INDEX), ...each('C', 2 ** 30)]
/** A tile of 128 or 64 queries, those of the heads that share a key, for each index of a grid. */
const forward: Limit[] = [
  ...each('D', 256),
  {
    what: 'T H / K',
    size: ({ T, H, K }) => (T! * H!) / K!,
    most: ({ D }, activations) => GRID * (activations === 'bf16' && D! <= 128 ? 128 : 64),
  },
]
const backward: Limit[] = [...each('D', 256), ...each('B', GRID), ...each('T', GRID * 32)]

const LIMITS: Readonly<Record<string, readonly Limit[]>> = {
  // in tiles of 128 channels
  embedding_bwd: [...each('NV', INDEX), ...each('C', GRID * 128)],
  rmsnorm_fwd: rmsnorm,
  rmsnorm_bwd: rmsnorm,
  matmul_nn: product('MNK'),
  matmul_nt: product('MNK'),
  matmul_tn: product('MNK'),
  matmul_swiglu: product('MNK'),
  attention_fwd: forward,
  attention_bwd: backward,
  attention_cached: forward,
  linear_cross_entropy_fwd: product('NCV'),
  linear_cross_entropy_bwd: product('NCV'),
}

/** Throws RangeError where an op of a GPU is larger than its kernels can be. */
export function checkLimits(op: string, dims: Dims, activations: DType | undefined): void {
  for (const { what, size, most } of LIMITS[op] ?? []) {
    const [actual, limit] = [size(dims), most(dims, activations)]
    if (actual <= limit) continue
    throw new RangeError(
      `${op}: ${what} is ${actual}, but a GPU's kernels take at most ${limit}; device "cpu" takes more`,
    )
  }
}
