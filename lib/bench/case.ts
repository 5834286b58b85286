// What a case is, and the parts that cases of all devices are made of.
import { copy, type Kernel, kernelSide, matmul, RUN_SECONDS, type Target } from './kernels.js'
import type { Side } from './measure.js'
import { copySide, type PeerCase, type Peers } from './peers.js'

export const stems = [
  'matmul',
  'attention',
  'rope',
  'rmsnorm',
  'swiglu',
  'linear_cross_entropy',
  'embedding',
  'adamw',
  'copy',
  'step',
  'load',
  'generate',
  'decode',
  'eval',
] as const
export type Stem = (typeof stems)[number]

export interface Setting {
  /** As for Device.open. */
  device: string
  /** Whether that device runs the CUDA kernels, on a GPU or not. */
  gpu: boolean
  /** Numbers of threads; long training steps, loading and generating use the largest. On a GPU [0]. */
  threads: readonly number[]
  /** Small sizes: shows that everything works, not how fast it is. */
  quick: boolean
  /** Size of the file of the stem load. */
  loadBytes: number
  /** Bytes of the last level of cache; data that are to come from memory are four times as large. */
  cacheBytes: number
  /** Bytes of device memory that a training step may take. */
  memoryBytes: number
}

export type Unit = 'GFLOP/s' | 'GB/s'
type AskPeers = Pick<Peers, 'sides'>

export interface Case {
  stem: Stem
  name: string
  threads: number
  unit: Unit
  /** What it is to reach: a part of the rate of another side. */
  bar?: { side: string; least: number }
  /** Seconds are long here: fewer runs will do. */
  heavy?: boolean
  /** The side that stands for what the machine can do. */
  roofline: 'matmul' | 'copy' | 'read' | 'cat'
  /** Our side, then the peers', then the roofline. */
  sides(peers: AskPeers): Promise<Side[]>
}

/** Rates of one CPU thread that the number of repeats is guessed from. */
const GUESS = { 'GFLOP/s': 220e9, 'GB/s': 20e9 }

/** On a GPU, the repeats of an operation use this much data in turn, a multiple of every level-2 cache there is. */
const ROTATED_BYTES = 512 << 20
const MOST_SETS = 16

/** Bytes of data that no cache holds. */
export const outOfCache = ({ quick, cacheBytes }: Setting): number =>
  quick ? 1 << 20 : Math.min(4 * cacheBytes, 1 << 30)

export const targetOf = ({ device }: Setting, threads: number): Target => ({ device, threads })

/**
 * What the machine can do: a large matrix product, or a plain copy. On the CPU our own product and the C library's copy,
 * at the same number of threads and in `dtype`; on a GPU in bf16 cuBLASLt's and PyTorch's where they are there, else our own.
 */
export async function rooflineSide(
  kind: 'matmul' | 'copy',
  setting: Setting,
  threads: number,
  peers: AskPeers,
  dtype: 'f32' | 'bf16' = 'f32',
): Promise<Side> {
  const { quick, gpu } = setting
  const target = targetOf(setting, threads)
  if (!gpu) {
    if (kind === 'copy') return copySide(outOfCache(setting) / 2, quick ? 1 : 2, threads)
    const size = quick ? 512 : 2048
    const side = await kernelSide(matmul('nn', size, size, size, dtype), 2 * size ** 3, target, { count: 1 })
    return { ...side, name: kind }
  }
  const size = kind === 'copy' ? (quick ? 1 << 12 : 256 << 20) : quick ? 64 : 8192
  const repeats = quick ? 1 : 8
  const work = kind === 'copy' ? 4 * size : 2 * size ** 3
  const peer: PeerCase =
    kind === 'copy' ? { op: 'copy', size } : { op: 'matmul', layout: 'nt', m: size, n: size, k: size }
  const sides = await peers.sides({ ...peer, dtype: 'bf16', sets: 1 }, work * repeats, repeats, 0)
  const dispose = async (): Promise<void> => {
    for (const side of sides) await side.dispose?.()
  }
  if (sides[0]) return { ...sides[0], name: kind, dispose }
  const kernel = kind === 'copy' ? copy(size, 'bf16') : matmul('nt', size, size, size, 'bf16')
  return { ...(await kernelSide(kernel, work, target, { count: repeats })), name: kind }
}

export interface KernelCase {
  stem: Stem
  name: string
  unit: Unit
  /** Of one time. */
  work: number
  kernel: Kernel
  /** Bytes that one time reads and writes; they decide how many sets of tensors are used in turn on a GPU. */
  bytes: number
  peer?: PeerCase
  /** Other ways of ours to do the same work, by name. */
  others?: Record<string, Kernel>
  bar?: Case['bar']
}

/** A case of one operation, for each number of threads. */
export function kernelCases(setting: Setting, { kernel, peer, others, work, bytes, ...rest }: KernelCase): Case[] {
  const { gpu, quick } = setting
  const roofline = rest.unit === 'GB/s' ? 'copy' : 'matmul'
  return setting.threads.map((threads) => {
    const target = targetOf(setting, threads)
    const wanted = Math.round(((quick ? 0.1 : 1) * RUN_SECONDS * GUESS[rest.unit] * threads) / work)
    const count = !gpu ? Math.max(1, Math.min(1000, wanted)) : quick ? 2 : 'measured'
    const sets = !gpu ? 1 : quick ? 2 : Math.max(1, Math.min(MOST_SETS, Math.ceil(ROTATED_BYTES / bytes)))
    const sides = async (peers: AskPeers): Promise<Side[]> => {
      const sides: Side[] = []
      try {
        const own = await kernelSide(kernel, work, target, { count, sets })
        sides.push(own)
        for (const [name, other] of Object.entries(others ?? {})) {
          sides.push({ ...(await kernelSide(other, work, target, { count: own.repeats, sets })), name })
        }
        const asked = gpu ? { dtype: 'bf16', sets, ...peer } : peer
        if (peer) sides.push(...(await peers.sides({ ...peer, ...asked }, work * own.repeats, own.repeats, threads)))
        sides.push(await rooflineSide(roofline, setting, threads, peers))
        return sides
      } catch (error) {
        for (const side of sides) await side.dispose?.()
        throw error
      }
    }
    return { ...rest, threads, roofline, sides }
  })
}
