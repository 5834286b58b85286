// The case list of GPUs: bf16 at the sizes of LLaMA models, beside cuBLASLt, PyTorch and transformers.
import { type Case, type KernelCase, kernelCases, rooflineSide, type Setting, targetOf } from './case.js'
import {
  adamw,
  adamwBytes,
  adamwName,
  append,
  attention,
  type AttentionShape,
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
import { evalSide } from './evaluation.js'
import { loadSides } from './load.js'
import { LLAMA_1B, LLAMA_25M, LLAMA_7B, LLAMA_TINY } from './models.js'
import type { MatmulCase } from './peers.js'
import { generateSide } from './step.js'
import { fitting, trainingSide } from './training.js'

export function gpuCases(setting: Setting): Case[] {
  const kernels = [
    ...matmuls(setting),
    ...attentions(setting),
    ...ropes(setting),
    ...rmsnorms(setting),
    ...swiglus(setting),
    ...crossEntropies(setting),
    ...embeddings(setting),
    ...optimizers(setting),
    ...copies(setting),
  ]
  return [
    ...kernels.flatMap((one) => kernelCases(setting, one)),
    ...steps(setting),
    ...loads(setting),
    ...generations(setting),
    ...evaluations(setting),
  ]
}

function matmuls({ quick }: Setting): KernelCase[] {
  const of = (layout: Layout, m: number, n: number, k: number): KernelCase => ({
    ...{ stem: 'matmul', name: `${layout} ${m} x ${n} x ${k}`, unit: 'GFLOP/s', work: 2 * m * n * k },
    bytes: 2 * (m * k + n * k + m * n),
    kernel: matmul(layout, m, n, k, 'bf16'),
    peer: { op: 'matmul', layout, m, n, k } as MatmulCase,
    bar: { side: 'cublaslt', least: 0.92 },
  })
  const layouts = ['nn', 'nt', 'tn'] as const
  if (quick) return layouts.map((layout) => of(layout, 40, 72, 96))
  const cubes = [4096, 8192].flatMap((size) => layouts.map((layout) => of(layout, size, size, size)))
  // The products of a layer of 7B on 32k tokens (q, k, v and o; gate and up; down; both of these pairs in one; the
  // vocabulary): forward, gradient of x, gradient of w.
  const rows = 32768
  const shapes = [
    [4096, 4096],
    [11008, 4096],
    [4096, 11008],
    [12288, 4096],
    [22016, 4096],
    [32000, 4096],
  ] as const
  const layers = shapes.flatMap(([o, i]) => [of('nt', rows, o, i), of('nn', rows, i, o), of('tn', o, i, rows)])
  return [...cubes, ...layers]
}

const PRODUCTS = { fwd: 2, bwd: 5, 'fwd+bwd': 7 }

const elements = ({ batch, time, heads, headDim }: AttentionShape): number => batch * time * heads * headDim

/** The visible half of the products, as FlashAttention counts. */
const attentionWork = (mode: keyof typeof PRODUCTS, shape: AttentionShape): number =>
  PRODUCTS[mode] * elements(shape) * (shape.time + 1)

function attentions({ quick }: Setting): KernelCase[] {
  const of = (mode: 'fwd' | 'fwd+bwd', shape: AttentionShape): KernelCase => {
    const { batch, time, heads, kvHeads, headDim } = shape
    return {
      stem: 'attention',
      name: `${mode} D ${headDim}, T ${time}, B ${batch}, H ${heads}${kvHeads < heads ? ` on ${kvHeads}` : ''}`,
      ...{ unit: 'GFLOP/s', work: attentionWork(mode, shape) },
      bytes: 2 * elements(shape) * (mode === 'fwd' ? 4 : 8),
      kernel: attention(mode, shape, 'bf16'),
      peer: { op: 'attention', mode, ...shape },
      bar: { side: 'flash', least: mode === 'fwd' ? 0.95 : 0.8 },
    }
  }
  const modes = ['fwd', 'fwd+bwd'] as const
  if (quick) {
    return modes.flatMap((mode) =>
      [64, 128].map((headDim) => of(mode, { batch: 1, time: 80, heads: 2, kvHeads: 1, headDim })),
    )
  }
  // As FlashAttention's own tables: 2048 channels and 16k tokens, in longer and longer rows. The length of the targets first.
  const plain = [16384, 2048, 4096, 8192, 32768].flatMap((time) =>
    [128, 64].flatMap((headDim) => {
      const heads = 2048 / headDim
      return modes.map((mode) => of(mode, { batch: Math.max(1, 16384 / time), time, heads, kvHeads: heads, headDim }))
    }),
  )
  const grouped = modes.map((mode) => of(mode, { batch: 1, time: 16384, heads: 32, kvHeads: 8, headDim: 128 }))
  return [...plain, ...grouped]
}

/**
 * What the rotation costs. The same kernel without it does not exist, and a table of angles that are all 0 would cost the
 * same; so the forward pass, which rotates its keys once before and its queries while it reads them, is measured beside
 * the one over keys that were rotated before, and the rotation of keys on its own.
 */
function ropes({ quick }: Setting): KernelCase[] {
  const shape = quick
    ? { batch: 1, time: 80, heads: 2, kvHeads: 2, headDim: 64 }
    : { batch: 1, time: 16384, heads: 16, kvHeads: 16, headDim: 128 }
  const others = { 'keys rotated before': attentionOfRotated(shape, 'bf16') }
  return [
    {
      ...{ stem: 'rope', name: `attention fwd D ${shape.headDim}, T ${shape.time}`, unit: 'GFLOP/s' },
      ...{ work: attentionWork('fwd', shape), bytes: 8 * elements(shape), others },
      kernel: attention('fwd', shape, 'bf16'),
      bar: { side: 'keys rotated before', least: 1 / 1.02 },
    },
    {
      ...{ stem: 'rope', name: `keys into the cache D ${shape.headDim}, T ${shape.time}`, unit: 'GB/s' },
      ...{ work: 8 * elements(shape), bytes: 8 * elements(shape), kernel: append(shape, 'bf16') },
    },
  ]
}

/** The memory-bound ones are held against the copy. */
const COPY = { unit: 'GB/s', bar: { side: 'copy', least: 0.88 } } as const

function rmsnorms({ quick }: Setting): KernelCase[] {
  const [rows, channels] = quick ? [20, 96] : [32768, 4096]
  return (['fwd', 'bwd'] as const).map((mode) => {
    const bytes = 2 * rows * channels * (mode === 'fwd' ? 2 : 3)
    return {
      ...{ ...COPY, stem: 'rmsnorm', name: `${mode} ${rows} x ${channels}`, work: bytes, bytes },
      kernel: rmsnorm(mode, rows, channels, 'bf16'),
      peer: { op: 'rmsnorm', mode, rows, channels },
    }
  })
}

function swiglus({ quick }: Setting): KernelCase[] {
  const [rows, channels] = quick ? [20, 96] : [32768, 11008]
  return (['fwd', 'bwd'] as const).map((mode) => {
    const bytes = 2 * rows * channels * (mode === 'fwd' ? 3 : 5)
    return {
      ...{ ...COPY, stem: 'swiglu', name: `${mode} ${rows} x ${channels}`, work: bytes, bytes },
      kernel: swiglu(mode, rows * channels, 'bf16'),
      peer: { op: 'swiglu', mode, size: rows * channels },
    }
  })
}

function crossEntropies({ quick }: Setting): KernelCase[] {
  const [rows, channels, vocabulary] = quick ? [24, 64, 200] : [8192, 4096, 32000]
  // 131: the model's own, 16 MB of logits
  return (quick ? [16] : [131, 2048]).map((chunk) => ({
    stem: 'linear_cross_entropy',
    name: `fwd+bwd ${rows} x ${channels} x ${vocabulary}, ${chunk} rows at a time`,
    ...{ unit: 'GFLOP/s', work: 6 * rows * channels * vocabulary },
    bytes: 4 * rows * channels + 6 * vocabulary * channels,
    kernel: linearCrossEntropy(rows, channels, vocabulary, chunk, 'bf16'),
    peer: { op: 'cross_entropy', rows, channels, vocabulary },
  }))
}

function embeddings({ quick }: Setting): KernelCase[] {
  const [rows, channels, vocabulary] = quick ? [40, 64, 50] : [32768, 4096, 32000]
  return (['fwd', 'bwd'] as const).map((mode) => {
    // the gradient of the table is f32
    const bytes = channels * (mode === 'fwd' ? 4 * rows : 2 * rows + 4 * vocabulary)
    return {
      ...{ ...COPY, stem: 'embedding', name: `${mode} ${rows} x ${channels}, V ${vocabulary}`, work: bytes, bytes },
      kernel: embedding(mode, rows, channels, vocabulary, 'bf16'),
      peer: { op: 'embedding', mode, rows, channels, vocabulary },
    }
  })
}

function optimizers({ quick }: Setting): KernelCase[] {
  const size = quick ? 2048 : 128 << 20
  return OPTIMIZERS.map(([name, optimizer]) => {
    const bytes = adamwBytes(optimizer) * size
    return {
      ...{
        ...COPY,
        stem: 'adamw',
        name: adamwName(name, optimizer, size),
        work: bytes,
        bytes,
        kernel: adamw(size, optimizer),
      },
      ...(name === 'f32' && { peer: { op: 'adamw', size, dtype: 'f32' } }),
      ...(optimizer.states === 'u8' && { bar: { side: 'copy', least: 0.85 } }),
    }
  })
}

function copies({ quick }: Setting): KernelCase[] {
  const size = quick ? 3000 : 128 << 20
  return (['bf16', 'f32'] as const).map((dtype) => {
    const bytes = (dtype === 'bf16' ? 4 : 8) * size
    return {
      ...{ ...COPY, stem: 'copy', name: `cast ${dtype} ${size}`, work: bytes, bytes },
      kernel: copy(size, dtype),
      peer: { op: 'copy', size, dtype },
    }
  })
}

function steps(setting: Setting): Case[] {
  const { quick, memoryBytes } = setting
  const models = quick
    ? ([['tiny', LLAMA_TINY, [48]]] as const)
    : ([
        ['7B', LLAMA_7B, [4096, 32768]], // first: what matters most is there when the time is up
        ['1.1B', LLAMA_1B, [4096, 32768]],
        ['25M', LLAMA_25M, [4096, 32768]],
      ] as const)
  return models.flatMap(([name, config, times]) =>
    times.map((time): Case => ({
      ...{ stem: 'step', name: `${name}, T ${time}`, threads: 0, unit: 'GFLOP/s', roofline: 'matmul', heavy: true },
      sides: async (peers) => {
        // 7B fills the memory: its peers do not fit beside it
        const alone = name === '7B'
        const chosen = fitting(config, time, alone ? memoryBytes : memoryBytes / 2)
        const ours = await trainingSide(chosen, time, targetOf(setting, 0))
        const peer = { op: 'step', time, config: chosen.config, dtype: 'bf16' } as const
        const theirs = alone ? [] : await peers.sides(peer, ours.work, 1, 0)
        return [ours, ...theirs, await rooflineSide('matmul', setting, 0, peers)]
      },
    })),
  )
}

function loads({ loadBytes, device }: Setting): Case[] {
  const name = `safetensors, ${(loadBytes / 1e6).toFixed(0)} MB`
  return [
    {
      ...{ stem: 'load', name, threads: 0, unit: 'GB/s', roofline: 'cat', heavy: true },
      sides: () => loadSides(loadBytes, device),
    },
  ]
}

function generations(setting: Setting): Case[] {
  const [name, config, lengths] = setting.quick
    ? (['tiny', LLAMA_TINY, [16]] as const)
    : (['1.1B', LLAMA_1B, [1024, 32000]] as const)
  const of = (stem: 'generate' | 'decode', length: number): Case => ({
    ...{ stem, name: `${name}, ${length} cached`, threads: 0, unit: 'GB/s', roofline: 'copy' },
    ...(stem === 'decode' && { bar: { side: 'copy', least: 1 / 1.3 } }),
    sides: async (peers) => {
      const ours = await generateSide(config, length, targetOf(setting, 0))
      return [ours, await rooflineSide('copy', setting, 0, peers)]
    },
  })
  return [...lengths.map((length) => of('generate', length)), of('decode', setting.quick ? 16 : 8192)]
}

function evaluations(setting: Setting): Case[] {
  const [name, config, window, stride] = setting.quick
    ? (['tiny', LLAMA_TINY, 200, 64] as const)
    : (['1.1B', LLAMA_1B, 8192, 256] as const)
  return [
    {
      ...{ stem: 'eval', name: `${name}, window ${window}, stride ${stride}`, threads: 0, unit: 'GFLOP/s' },
      ...{ roofline: 'matmul', heavy: true, bar: { side: 'transformers', least: 2 } },
      sides: async (peers) => {
        const ours = await evalSide(config, window, stride, targetOf(setting, 0))
        const theirs = await peers.sides({ op: 'eval', window, stride, config, dtype: 'bf16' }, ours.work, 1, 0)
        return [ours, ...theirs, await rooflineSide('matmul', setting, 0, peers)]
      },
    },
  ]
}
