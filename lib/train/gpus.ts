import { didYouMean, quote } from '../errors.js'

/** What is known of a GPU: figures of others, none measured with these kernels, and only good for estimates. */
export interface Gpu {
  readonly name: string
  readonly description: string
  /** Memory as the driver reports it to a program; less than what the name says. */
  readonly capacityBytes: number
  /** Bytes a second that a large copy reads and writes. */
  readonly bandwidth: number
  /** FLOP/s: the data sheet's dense bf16 peak, the denominator of MFU. */
  readonly peak: number
  /** FLOP/s: large bf16 products, attention forward and backward. */
  readonly matmul: number
  readonly attentionForward: number
  readonly attentionBackward: number
  /** FLOP/s of float32 arithmetic outside of tensor cores. */
  readonly float32: number
  /** Bytes a second to and from pinned memory of the host, one way. */
  readonly bus: number
  /** Power limit. */
  readonly watts: number
}

const GIB = 2 ** 30
const T = 1e12
const G = 1e9

/**
 * Capacities are the smallest "total capacity" that PyTorch's messages quote for the card (cudaMemGetInfo), ECC on;
 * a100-40g, a100-80g, h100 and rtx cards as found in public issues, l40s and h200 as remembered.
 *
 * Rates are those of hand-written kernels with mma.sync, which ours are, as published:
 * - A100: products 240 TFLOP/s (0.92 of cuBLAS, gau-nernst/learn-cuda); attention FlashAttention-2's, of which about 0.9
 *   forward (lubits.ch, yencal.github.io) and 0.8 backward, deterministic.
 * - H100, H200: mma.sync reaches 300 to 400 (CUTLASS issue 1662), and FlashAttention-2 335 forward, 328 with backward.
 *   Kernels with wgmma would be about twice as fast.
 * - The others: 0.75 of the data sheet's peak with float32 accumulation; attention in the ratio of an A100.
 * Bandwidth: 4.3 TB/s measured on an H200; elsewhere 0.85 to 0.9 of the data sheet. Bus: PCIe 4.0 x16 about 25 GB/s,
 * 5.0 about 50.
 */
const GPUS: readonly Gpu[] = [
  gpu('a100-40g', 'NVIDIA A100 SXM 40 GB', 39.39, 1.4 * T, 312 * T, [240, 190, 160], 19.5, 25, 400),
  gpu('a100-80g', 'NVIDIA A100 SXM 80 GB', 79.14, 1.73 * T, 312 * T, [240, 190, 160], 19.5, 25, 400),
  gpu('h100-80g', 'NVIDIA H100 SXM 80 GB', 79.11, 2.9 * T, 989 * T, [350, 310, 250], 67, 50, 700),
  gpu('h200-141g', 'NVIDIA H200 SXM 141 GB', 139.7, 4.3 * T, 989 * T, [350, 310, 250], 67, 50, 700),
  gpu('l40s', 'NVIDIA L40S 48 GB', 44.4, 0.73 * T, 362 * T, [270, 215, 180], 91.6, 25, 350),
  gpu('rtx-3090', 'NVIDIA GeForce RTX 3090 24 GB', 23.68, 0.84 * T, 71 * T, [53, 42, 35], 35.6, 25, 350),
  gpu('rtx-4090', 'NVIDIA GeForce RTX 4090 24 GB', 23.64, 0.9 * T, 165 * T, [124, 98, 83], 82.6, 25, 450),
]

function gpu(
  name: string,
  description: string,
  gibibytes: number,
  bandwidth: number,
  peak: number,
  [matmul, forward, backward]: readonly [number, number, number],
  float32: number,
  bus: number,
  watts: number,
): Gpu {
  return {
    name,
    description,
    capacityBytes: Math.floor(gibibytes * GIB),
    bandwidth,
    peak,
    matmul: matmul * T,
    attentionForward: forward * T,
    attentionBackward: backward * T,
    float32: float32 * T,
    bus: bus * G,
    watts,
  }
}

export const gpus: readonly Gpu[] = GPUS

/** A known GPU by its name. Throws RangeError, with what was perhaps meant. */
export function findGpu(name: string): Gpu {
  const found = GPUS.find((one) => one.name === name)
  if (found) return found
  const names = [...GPUS.map((one) => one.name), 'cuda', 'cpu']
  const guess = didYouMean(name, names)
  throw new RangeError(
    `there is no device ${quote(name)}${guess}${guess ? ' Known' : '; known'} are ${names.join(', ')}`,
  )
}

/** The known GPU that a driver calls so: the largest that fits the name and is not larger than `capacityBytes`. */
export function gpuCalled(description: string, capacityBytes: number): Gpu | undefined {
  const model = (text: string): string | undefined => /\b(A100|H100|H200|L40S|RTX \d{4})\b/.exec(text)?.[1]
  const same = GPUS.filter((one) => model(one.description) === model(description) && model(description) !== undefined)
  return same.findLast((one) => one.capacityBytes <= capacityBytes * 1.01) ?? same[0]
}

/** What the driver takes for a program's context and the kernels' code, stated because no plan can know it. */
export const DRIVER_BYTES = 600 << 20

/** '24g', '24GiB' (2^30), '24GB' (10^9), '80000M' or a number of bytes, of which there are at least `least`. */
export function readBytes(value: number | string, name: string, least = 1): number {
  const [, digits, prefix = '', binary, b] =
    /^\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i)?(b)?|b)?\s*$/i.exec(String(value)) ?? []
  const power = ' kmgt'.indexOf(prefix.toLowerCase() || ' ')
  const bytes = Math.floor(Number(digits) * (b && !binary ? 1000 : 1024) ** power)
  if (Number.isSafeInteger(bytes) && bytes >= least) return bytes
  throw new RangeError(`${name} is ${quote(value)}, but must be a size such as 24g (gibibytes), 24GB, 23.5GiB or bytes`)
}
