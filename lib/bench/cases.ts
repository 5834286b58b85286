// The case list of the CPU: what is measured, how much work it is, and what it is compared with. That of GPUs is in gpu.ts.
import { type Case, kernelCases, outOfCache, rooflineSide, type Setting, type Stem, targetOf } from './case.js'
import { evalSide } from './evaluation.js'
import { gpuCases } from './gpu.js'
import {
  adamw,
  adamwBytes,
  adamwName,
  append,
  attention,
  attentionOfRotated,
  copy,
  embedding,
  type Layout,
  linearCrossEntropy,
  matmul,
  OPTIMIZERS,
  rmsnorm,
  swiglu,
} from './kernels.js'
import { loadSides } from './load.js'
import type { Side } from './measure.js'
import { type MatmulCase, readSide } from './peers.js'
import { LLAMA_1M, LLAMA_25M } from './models.js'
import { generateSide, stepSide } from './step.js'

/** All cases, or those of some stems. */
export function listCases(setting: Setting, chosen?: readonly Stem[]): Case[] {
  const all = setting.gpu ? gpuCases(setting) : BUILDERS.flatMap((build) => build(setting))
  return all.filter(({ stem }) => !chosen || chosen.includes(stem))
}

const BUILDERS: readonly ((setting: Setting) => Case[])[] = [
  matmulCases,
  attentionCases,
  ropeCases,
  rmsnormCases,
  swigluCases,
  crossEntropyCases,
  embeddingCases,
  adamwCases,
  copyCases,
  stepCases,
  loadCases,
  generateCases,
  decodeCases,
  evalCases,
]

function matmulCases(setting: Setting): Case[] {
  const of = (name: string, layout: Layout, m: number, n: number, k: number): Case[] => {
    const peer: MatmulCase = { op: 'matmul', layout, m, n, k }
    const bar = { side: 'openblas', least: 0.95 }
    const kernel = matmul(layout, m, n, k)
    const bytes = 4 * (m * n + m * k + n * k)
    return kernelCases(setting, {
      ...{ stem: 'matmul', unit: 'GFLOP/s', work: 2 * m * n * k, bytes, name, kernel, peer, bar },
    })
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

const shapeOf = (time: number) => ({ batch: 1, time, heads: 8, kvHeads: 8, headDim: 64 })

function attentionCases(setting: Setting): Case[] {
  return (setting.quick ? [128] : [2048, 4096]).flatMap((time) =>
    (['fwd', 'bwd', 'fwd+bwd'] as const).flatMap((mode) => {
      const products = { fwd: 2, bwd: 5, 'fwd+bwd': 7 }[mode]
      const shape = shapeOf(time)
      const { heads, headDim } = shape
      return kernelCases(setting, {
        ...{ stem: 'attention', name: `${mode} T ${time}`, unit: 'GFLOP/s' },
        work: products * heads * headDim * time * (time + 1),
        bytes: 4 * 4 * heads * headDim * time,
        kernel: attention(mode, shape),
        peer: { op: 'attention', mode, ...shape },
        ...(mode === 'fwd+bwd' && { bar: { side: 'matmul', least: 0.6 } }),
      })
    }),
  )
}

function ropeCases(setting: Setting): Case[] {
  const shape = shapeOf(setting.quick ? 128 : 4096)
  const { heads, headDim, time } = shape
  const elements = heads * headDim * time
  return [
    ...kernelCases(setting, {
      ...{ stem: 'rope', name: `attention fwd T ${time}`, unit: 'GFLOP/s', work: 2 * elements * (time + 1) },
      ...{ bytes: 16 * elements, kernel: attention('fwd', shape) },
      others: { 'keys rotated before': attentionOfRotated(shape) },
    }),
    ...kernelCases(setting, {
      ...{ stem: 'rope', name: `keys into the cache, ${time}`, unit: 'GB/s', work: 16 * elements },
      ...{ bytes: 16 * elements, kernel: append(shape) },
    }),
  ]
}

function rmsnormCases(setting: Setting): Case[] {
  const channels = 512
  const rows = Math.ceil(outOfCache(setting) / (2 * 4 * channels))
  return (['fwd', 'bwd'] as const).flatMap((mode) => {
    const bytes = { fwd: 8, bwd: 12 }[mode] * rows * channels
    return kernelCases(setting, {
      ...{ stem: 'rmsnorm', name: `${mode} ${rows} x ${channels}`, unit: 'GB/s', work: bytes, bytes },
      kernel: rmsnorm(mode, rows, channels),
      peer: { op: 'rmsnorm', mode, rows, channels },
    })
  })
}

function swigluCases(setting: Setting): Case[] {
  const size = Math.ceil(outOfCache(setting) / (3 * 4))
  return (['fwd', 'bwd'] as const).flatMap((mode) => {
    const bytes = { fwd: 12, bwd: 20 }[mode] * size
    return kernelCases(setting, {
      ...{ stem: 'swiglu', name: `${mode} ${size}`, unit: 'GB/s', work: bytes, bytes },
      kernel: swiglu(mode, size),
      peer: { op: 'swiglu', mode, size },
    })
  })
}

function crossEntropyCases(setting: Setting): Case[] {
  const channels = 512
  const rows = setting.quick ? 64 : 2048
  return (setting.quick ? [256] : [4096, 32000]).flatMap((vocabulary) =>
    kernelCases(setting, {
      ...{ stem: 'linear_cross_entropy', name: `fwd+bwd ${rows} x ${channels} x ${vocabulary}`, unit: 'GFLOP/s' },
      work: 6 * rows * channels * vocabulary,
      bytes: 4 * (2 * rows * channels + 2 * vocabulary * channels),
      // as the model does: logits of 16 MB at a time
      kernel: linearCrossEntropy(rows, channels, vocabulary, Math.min(rows, Math.floor((4 << 20) / vocabulary))),
      peer: { op: 'cross_entropy', rows, channels, vocabulary },
    }),
  )
}

function embeddingCases(setting: Setting): Case[] {
  const [rows, channels, vocabulary] = setting.quick ? [64, 64, 100] : [1 << 15, 512, 32000]
  return (['fwd', 'bwd'] as const).flatMap((mode) => {
    const bytes = 4 * channels * (mode === 'fwd' ? 2 * rows : rows + vocabulary)
    return kernelCases(setting, {
      ...{
        stem: 'embedding',
        name: `${mode} ${rows} x ${channels}, V ${vocabulary}`,
        unit: 'GB/s',
        work: bytes,
        bytes,
      },
      kernel: embedding(mode, rows, channels, vocabulary),
      peer: { op: 'embedding', mode, rows, channels, vocabulary },
    })
  })
}

function adamwCases(setting: Setting): Case[] {
  const size = setting.quick ? 1 << 16 : Math.max(26 << 20, Math.ceil(outOfCache(setting) / 16))
  return OPTIMIZERS.flatMap(([name, optimizer, least]) => {
    const bytes = adamwBytes(optimizer) * size
    return kernelCases(setting, {
      ...{ stem: 'adamw', name: adamwName(name, optimizer, size), unit: 'GB/s', work: bytes, bytes },
      kernel: adamw(size, optimizer),
      ...(name === 'f32' && { peer: { op: 'adamw', size } }),
      bar: { side: 'copy', least },
    })
  })
}

function copyCases(setting: Setting): Case[] {
  const size = Math.ceil(outOfCache(setting) / 8)
  return kernelCases(setting, {
    ...{ stem: 'copy', name: `cast f32 ${size}`, unit: 'GB/s', work: 8 * size, bytes: 8 * size, kernel: copy(size) },
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
      return [ours, ...theirs, await rooflineSide('matmul', setting, threads, peers)]
    },
  })
  // The long ones, which take minutes on one thread, with all threads only.
  return times.flatMap((time, i) => (i === 0 ? setting.threads : [most(setting)]).map((threads) => of(time, threads)))
}

function loadCases(setting: Setting): Case[] {
  const { loadBytes, device } = setting
  const name = `safetensors, ${(loadBytes / 1e6).toFixed(0)} MB`
  const bar = { side: 'cat', least: 0.8 }
  const sides = (): Promise<Side[]> => loadSides(loadBytes, device)
  return [{ stem: 'load', name, threads: most(setting), unit: 'GB/s', roofline: 'cat', bar, heavy: true, sides }]
}

function generateCases(setting: Setting): Case[] {
  const threads = most(setting)
  return (setting.quick ? [16] : [128, 1024, 4000]).map((length) => ({
    ...{ stem: 'generate', name: `25M, ${length} cached`, threads, unit: 'GB/s', roofline: 'copy' },
    sides: async (peers) => {
      const ours = await generateSide(LLAMA_25M, length, targetOf(setting, threads))
      return [ours, await rooflineSide('copy', setting, threads, peers)]
    },
  }))
}

/** Sliding windows as in the paper: the last 256 tokens of a window are scored, the window has positions from 0. */
function evalCases(setting: Setting): Case[] {
  const models = setting.quick
    ? [{ model: '1M', config: LLAMA_1M, window: 256, stride: 64, dtype: 'f32' as const }]
    : [
        { model: '25M', config: LLAMA_25M, window: 2048, stride: 256, dtype: 'f32' as const },
        { model: '25M', config: LLAMA_25M, window: 2048, stride: 256, dtype: 'bf16' as const },
        { model: '1M', config: LLAMA_1M, window: 1024, stride: 256, dtype: 'f32' as const },
      ]
  const of = ({ model, config, window, stride, dtype }: (typeof models)[number], threads: number): Case => ({
    ...{
      stem: 'eval',
      name: `${model}${dtype === 'bf16' ? ' in bf16' : ''}, window ${window}, stride ${stride}`,
      threads,
    },
    ...{ unit: 'GFLOP/s', roofline: 'matmul', heavy: true, bar: { side: 'transformers', least: 2 } },
    sides: async (peers) => {
      const ours = await evalSide(config, window, stride, targetOf(setting, threads), dtype)
      const theirs = await peers.sides({ op: 'eval', window, stride, config, dtype }, ours.work, 1, threads)
      return [ours, ...theirs, await rooflineSide('matmul', setting, threads, peers, dtype)]
    },
  })
  return models.flatMap((model) => setting.threads.map((threads) => of(model, threads)))
}

/** One token after the other behind a long text: all weights and the whole cache are read for each, next to nothing written. */
function decodeCases(setting: Setting): Case[] {
  const length = setting.quick ? 16 : 8192
  return setting.threads.map((threads) => ({
    ...{ stem: 'decode', name: `25M, ${length} cached`, threads, unit: 'GB/s', roofline: 'read', heavy: true },
    bar: { side: 'read', least: 1 / 1.3 },
    sides: async (peers) => {
      const ours = await generateSide(LLAMA_25M, length, targetOf(setting, threads))
      const copied = await rooflineSide('copy', setting, threads, peers)
      return [ours, copied, readSide(outOfCache(setting), setting.quick ? 1 : 2, threads)]
    },
  }))
}
