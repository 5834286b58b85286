// cuBLASLt as a peer of matrix products on a GPU: the CUDA library opens it where it is installed (csrc/cuda/cublaslt.h).
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { type Buffer, Device } from '../runtime/device.js'
import { native } from '../runtime/native.js'
import { DTYPE_CODE, type PlainDType, type Tensor } from '../runtime/tensor.js'
import { random, result } from './data.js'
import type { Layout } from './kernels.js'
import type { Side } from './measure.js'

/** What csrc/addon.cc exports for this alone. */
interface PeerNative {
  peerOpen(device: number, path: string): string
  peerMultiply(
    device: number,
    dtype: number,
    transposeA: boolean,
    transposeB: boolean,
    m: number,
    n: number,
    k: number,
    matrices: Uint32Array,
    repeats: number,
  ): Promise<void>
}

const addon = (): PeerNative => native() as unknown as PeerNative

export interface Product {
  layout: Layout
  m: number
  n: number
  k: number
  dtype: PlainDType
}

/** a, b and c of a product, each in a buffer of its own. */
export type Matrices = readonly [Tensor, Tensor, Tensor]

/**
 * Opens it on a device, and gives its name and version. ROPEWALK_CUBLASLT names its file; else it is looked for under its
 * usual names, in the toolkit, and at `more`.
 */
export function openCublaslt(device: Device, more: readonly string[] = []): string {
  const named = process.env.ROPEWALK_CUBLASLT
  if (named) return addon().peerOpen(device.handle, named)
  const toolkit = join(process.env.CUDA_HOME || '/usr/local/cuda', 'lib64', 'libcublasLt.so')
  const path = [toolkit, ...more].find((file) => existsSync(file))
  try {
    return addon().peerOpen(device.handle, '')
  } catch (error) {
    if (path === undefined) throw error
    return addon().peerOpen(device.handle, path)
  }
}

/** Computes a product `repeats` times, on each of the sets of matrices in turn. After openCublaslt. */
export async function multiply(device: Device, product: Product, sets: readonly Matrices[], repeats: number) {
  const { layout, m, n, k, dtype } = product
  const buffers = sets.flatMap((set) => set.map(({ storage }) => (storage as Buffer).handle))
  const [transposeA, transposeB] = [layout === 'tn', layout === 'nt']
  const matrices = Uint32Array.from(buffers)
  const code = DTYPE_CODE[dtype]
  await addon().peerMultiply(device.handle, code, transposeA, transposeB, m, n, k, matrices, repeats)
}

/** The side of a case of matrix products; `work` is that of all repeats. */
export async function cublasltSide(
  name: string,
  more: readonly string[],
  product: Product,
  sets: number,
  work: number,
  repeats: number,
): Promise<Side> {
  const { layout, m, n, k, dtype } = product
  const device = Device.open(name)
  try {
    openCublaslt(device, more)
    const matrices: Matrices[] = []
    while (matrices.length < sets) {
      const a = await random(device, dtype, layout === 'tn' ? [k, m] : [m, k])
      const b = await random(device, dtype, layout === 'nt' ? [n, k] : [k, n])
      matrices.push([a, b, result(device, dtype, [m, n])])
    }
    const run = async (): Promise<number> => {
      const start = performance.now()
      await multiply(device, product, matrices, repeats)
      return (performance.now() - start) / 1000
    }
    return { name: 'cublaslt', work, run, dispose: () => device.dispose() }
  } catch (error) {
    device.dispose()
    throw error
  }
}
