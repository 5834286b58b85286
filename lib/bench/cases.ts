// The case list: what is measured, how much work it is, and what it is compared with.
import {
  attention,
  adamw,
  kernelSide,
  type Kernel,
  type Layout,
  linearCrossEntropy,
  matmul,
  rmsnorm,
  swiglu,
} from './kernels.js'
import { loadSides } from './load.js'
import type { Side } from './measure.js'
import { copySide, type MatmulCase, type PeerCase, type Peers } from './peers.js'
import { generateSide, LLAMA_25M, stepSide } from './step.js'

export const stems = [
  'matmul',
  'attention',
  'rmsnorm',
  'swiglu',
  'linear_cross_entropy',
  'adamw',
  'step',
  'load',
  'generate',
] as const
export type Stem = (typeof stems)[number]

export interface Setting {
  /** Numbers of threads; long training steps, loading and generating use the largest. */
  threads: readonly number[]
  /** Small sizes: shows that everything works, not how fast it is. */
  quick: boolean
  /** Size of the file of the stem load. */
  loadBytes: number
  /** Bytes of the last level of cache; data that are to come from memory are four times as large. */
  cacheBytes: number
}

export interface Case {
  stem: Stem
  name: string
  threads: number
  unit: 'GFLOP/s' | 'GB/s'
  /** What it is to reach: a part of the rate of another side. */
  bar?: { side: string; least: number }
  /** Seconds are long here: fewer runs will do. */
  heavy?: boolean
  /** The side that stands for what the machine can do. */
  roofline: 'matmul' | 'copy' | 'cat'
  /** Our side, then the peers', then the roofline. */
  sides(peers: Pick<Peers, 'sides'>): Promise<Side[]>
}

/** Seconds of a run to aim at, and the rates of one thread that the number of repeats is guessed from. */
const RUN_SECONDS = 0.03
const GUESS = { 'GFLOP/s': 220e9, 'GB/s': 20e9 }

/** All cases, or those of one stem. */
export function listCases(setting: Setting, stem?: Stem): Case[] {
  return BUILDERS.filter(([name]) => stem === undefined || name === stem).flatMap(([, build]) => build(setting))
}

const BUILDERS: readonly [Stem, (setting: Setting) => Case[]][] = [
  ['matmul', matmulCases],
  ['attention', attentionCases],
  ['rmsnorm', rmsnormCases],
  ['swiglu', swigluCases],
  ['linear_cross_entropy', crossEntropyCases],
  ['adamw', adamwCases],
  ['step', stepCases],
  ['load', loadCases],
  ['generate', generateCases],
]

/** Our own large matrix product, or a plain copy, at the same number of threads. */
async function rooflineSide(kind: 'matmul' | 'copy', setting: Setting, threads: number): Promise<Side> {
  if (kind === 'copy') return copySide(outOfCache(setting) / 2, setting.quick ? 1 : 2, threads)
  const size = setting.quick ? 512 : 2048
  const side = await kernelSide(matmul('nn', size, size, size), 2 * size ** 3, 1, threads)
  return { ...side, name: 'matmul' }
}

/** Bytes of data that no cache holds. */
const outOfCache = ({ quick, cacheBytes }: Setting): number => (quick ? 1 << 20 : Math.min(4 * cacheBytes, 1 << 30))

interface KernelCase {
  stem: Stem
  name: string
  unit: Case['unit']
  work: number
  kernel: Kernel
  peer?: PeerCase
  bar?: Case['bar']
}

/** A case of one operation, for each number of threads. */
function kernelCases(setting: Setting, { kernel, peer, work, ...rest }: KernelCase): Case[] {
  const roofline = rest.unit === 'GB/s' ? 'copy' : 'matmul'
  return setting.threads.map((threads) => {
    const wanted = ((setting.quick ? 0.1 : 1) * RUN_SECONDS * GUESS[rest.unit] * threads) / work
    const repeats = Math.max(1, Math.min(1000, Math.round(wanted)))
    const sides = async (peers: Pick<Peers, 'sides'>): Promise<Side[]> => [
      await kernelSide(kernel, work, repeats, threads),
      ...(peer ? await peers.sides(peer, work * repeats, repeats, threads) : []),
      await rooflineSide(roofline, setting, threads),
    ]
    return { ...rest, threads, roofline, sides }
  })
}

function matmulCases(setting: Setting): Case[] {
  const of = (name: string, layout: Layout, m: number, n: number, k: number): Case[] => {
    const peer: MatmulCase = { op: 'matmul', layout, m, n, k }
    const bar = { side: 'openblas', least: 0.95 }
    const kernel = matmul(layout, m, n, k)
    return kernelCases(setting, { stem: 'matmul', unit: 'GFLOP/s', work: 2 * m * n * k, name, kernel, peer, bar })
  }
  const layouts = ['nn', 'nt', 'tn'] as const
  const cubes = (setting.quick ? [128] : [512, 1024, 2048]).flatMap((size) =>
    layouts.flatMap((layout) => of(`${layout} ${size}`, layout, size, size, size)),
  )
  if (setting.quick) return cubes
  // The products of a training step on 1024 tokens of the 25M model: forward, gradient of x, gradient of w.
  const { hidden_size: c, intermediate_size: f, vocab_size: v } = LLAMA_25M
  const shapes = [
    [c, c],
    [f, c],
    [c, f],
    [v, c],
  ] as const
  const steps = shapes.flatMap(([o, i]) => [
    ...of(`nt 1024 x ${o} x ${i}`, 'nt', 1024, o, i),
    ...of(`nn 1024 x ${i} x ${o}`, 'nn', 1024, i, o),
    ...of(`tn ${o} x ${i} x 1024`, 'tn', o, i, 1024),
  ])
  return [...cubes, ...steps]
}

function attentionCases(setting: Setting): Case[] {
  const [heads, headDim] = [8, 64]
  return (setting.quick ? [128] : [2048, 4096]).flatMap((time) =>
    (['fwd', 'bwd', 'fwd+bwd'] as const).flatMap((mode) => {
      const products = { fwd: 2, bwd: 5, 'fwd+bwd': 7 }[mode]
      return kernelCases(setting, {
        ...{ stem: 'attention', name: `${mode} T ${time}`, unit: 'GFLOP/s' },
        work: products * heads * headDim * time * (time + 1),
        kernel: attention(mode, time, heads, headDim),
        peer: { op: 'attention', mode, time, heads, headDim },
        ...(mode === 'fwd+bwd' && { bar: { side: 'matmul', least: 0.6 } }),
      })
    }),
  )
}

function rmsnormCases(setting: Setting): Case[] {
  const channels = 512
  const rows = Math.ceil(outOfCache(setting) / (2 * 4 * channels))
  const bytes = { fwd: 8 * rows * channels, bwd: 12 * rows * channels }
  return (['fwd', 'bwd'] as const).flatMap((mode) =>
    kernelCases(setting, {
      ...{ stem: 'rmsnorm', name: `${mode} ${rows} x ${channels}`, unit: 'GB/s', work: bytes[mode] },
      kernel: rmsnorm(mode, rows, channels),
      peer: { op: 'rmsnorm', mode, rows, channels },
    }),
  )
}

function swigluCases(setting: Setting): Case[] {
  const size = Math.ceil(outOfCache(setting) / (3 * 4))
  const bytes = { fwd: 12 * size, bwd: 20 * size }
  return (['fwd', 'bwd'] as const).flatMap((mode) =>
    kernelCases(setting, {
      ...{ stem: 'swiglu', name: `${mode} ${size}`, unit: 'GB/s', work: bytes[mode] },
      kernel: swiglu(mode, size),
      peer: { op: 'swiglu', mode, size },
    }),
  )
}

function crossEntropyCases(setting: Setting): Case[] {
  const channels = 512
  const rows = setting.quick ? 64 : 2048
  return (setting.quick ? [256] : [4096, 32000]).flatMap((vocabulary) =>
    kernelCases(setting, {
      ...{ stem: 'linear_cross_entropy', name: `fwd+bwd ${rows} x ${channels} x ${vocabulary}`, unit: 'GFLOP/s' },
      work: 6 * rows * channels * vocabulary,
      // as the model does: logits of 16 MB at a time
      kernel: linearCrossEntropy(rows, channels, vocabulary, Math.min(rows, Math.floor((4 << 20) / vocabulary))),
      peer: { op: 'cross_entropy', rows, channels, vocabulary },
    }),
  )
}

function adamwCases(setting: Setting): Case[] {
  const size = setting.quick ? 1 << 16 : Math.max(26 << 20, Math.ceil(outOfCache(setting) / 16))
  return kernelCases(setting, {
    ...{ stem: 'adamw', name: `${size}`, unit: 'GB/s', work: 28 * size },
    kernel: adamw(size),
    peer: { op: 'adamw', size },
    bar: { side: 'copy', least: 0.8 },
  })
}

const most = ({ threads }: Setting): number => Math.max(...threads)

/** Context lengths of the training step. */
export const stepTimes = ({ quick }: Setting): number[] => (quick ? [64] : [1024, 4096])

function stepCases(setting: Setting): Case[] {
  const times = stepTimes(setting)
  const bar = { side: 'matmul', least: 0.7 }
  const of = (time: number, threads: number): Case => ({
    ...{ stem: 'step', name: `25M, T ${time}`, threads, unit: 'GFLOP/s', roofline: 'matmul', heavy: true, bar },
    sides: async (peers) => {
      const ours = await stepSide(time, threads)
      const theirs = await peers.sides({ op: 'step', time, config: LLAMA_25M }, ours.work, 1, threads)
      return [ours, ...theirs, await rooflineSide('matmul', setting, threads)]
    },
  })
  // The long ones, which take minutes on one thread, with all threads only.
  return times.flatMap((time, i) => (i === 0 ? setting.threads : [most(setting)]).map((threads) => of(time, threads)))
}

function loadCases(setting: Setting): Case[] {
  const { loadBytes } = setting
  const name = `safetensors, ${(loadBytes / 1e6).toFixed(0)} MB`
  const bar = { side: 'cat', least: 0.8 }
  const sides = (): Promise<Side[]> => loadSides(loadBytes)
  return [{ stem: 'load', name, threads: most(setting), unit: 'GB/s', roofline: 'cat', bar, heavy: true, sides }]
}

function generateCases(setting: Setting): Case[] {
  const threads = most(setting)
  return (setting.quick ? [16] : [128, 1024, 4000]).map((length) => ({
    ...{ stem: 'generate', name: `25M, ${length} cached`, threads, unit: 'GB/s', roofline: 'copy' },
    sides: async () => [await generateSide(length, threads), await rooflineSide('copy', setting, threads)],
  }))
}
