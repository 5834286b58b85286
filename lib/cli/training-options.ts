// Options that commands share which train, or plan to.
import type { LoraOptions, MemoryOptions, PlanRequest } from '../index.js'
import { loraParts, loraTargets } from '../model/lora.js'
import { defined, type OptionTable, UsageError, type Values } from './options.js'

const whole = { kind: 'number', value: 'n', min: 1, whole: true } as const

/** What a step keeps in memory, and in which form: the trainer's `memory`. */
export const memoryOptions = {
  'checkpoint-layers': { ...whole, min: 0, help: 'layers between two kept inputs; 0 keeps everything', default: '0' },
  'keep-attention': { kind: 'flag', help: "with checkpoints: attention's results are kept too" },
  'mlp-rows': { ...whole, min: 0, help: 'rows of the MLP at a time; 0: all', default: '0' },
  'attention-groups': { ...whole, help: 'groups of heads that the way back rotates one after the other', default: '1' },
  'logits-rows': { ...whole, min: 0, help: 'rows of logits at a time; 0: as the device likes', default: '0' },
  gradients: {
    kind: 'text',
    value: 'form',
    choices: ['float32', 'bfloat16', 'fused'],
    help: 'how they are held; fused: a layer at a time',
    default: 'float32',
  },
  masters: {
    kind: 'text',
    value: 'form',
    choices: ['float32', 'remainder', 'stochastic'],
    help: 'what bfloat16 weights are updated in',
    default: 'float32',
  },
  moments: {
    kind: 'text',
    value: 'form',
    choices: ['float32', 'bfloat16', '8bit'],
    help: "AdamW's moments",
    default: 'float32',
  },
  offload: { kind: 'text', value: 'what', help: "to the host's memory: checkpoints, optimizer, or both with a comma" },
} as const satisfies OptionTable

/** An adapter, and windows with positions that skip. */
export const adapterOptions = {
  lora: { ...whole, value: 'rank', help: 'train an adapter of this rank, not the weights' },
  'lora-alpha': { kind: 'number', value: 'x', above: 0, help: 'with --lora: scales it by x / rank', default: '16' },
  'lora-targets': {
    kind: 'text',
    value: 'names',
    help: `${loraTargets.slice(0, 4).join(',')} (the default), ${loraTargets.slice(4).join(',')}; or all`,
  },
  'also-train': { kind: 'text', value: 'names', help: `with --lora, whole: ${loraParts.join(', ')}, with commas` },
  quantize: {
    kind: 'text',
    value: 'form',
    choices: ['nf4', 'int8'],
    help: 'with --lora: how the matrices of the blocks are kept',
    default: 'as the others',
  },
  pose: { ...whole, help: 'PoSE: windows of --context tokens train the positions of this many' },
} as const satisfies OptionTable

export function readMemory(values: Values<typeof memoryOptions>): MemoryOptions {
  const offload = list(values.offload) ?? []
  for (const what of offload) {
    if (what !== 'checkpoints' && what !== 'optimizer') {
      throw new UsageError(`--offload is "${what}", but must be checkpoints, optimizer, or checkpoints,optimizer`)
    }
  }
  return defined({
    checkpointLayers: values['checkpoint-layers'],
    keepAttention: values['keep-attention'] || undefined,
    offloadCheckpoints: offload.includes('checkpoints') || undefined,
    mlpRows: values['mlp-rows'],
    attentionGroups: values['attention-groups'],
    logitsRows: values['logits-rows'],
    gradients: values.gradients,
    masters: values.masters,
    moments: values.moments,
    offloadOptimizer: offload.includes('optimizer') || undefined,
  }) as MemoryOptions
}

/** The options that give these; the other way round than `readMemory`. */
export function memoryWords(memory: MemoryOptions): string {
  const { offloadCheckpoints, offloadOptimizer, keepAttention, ...rest } = memory
  const words = Object.entries(rest).flatMap(([name, value]) => [
    `--${name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`,
    String(value),
  ])
  if (keepAttention) words.push('--keep-attention')
  const offload = [...(offloadCheckpoints ? ['checkpoints'] : []), ...(offloadOptimizer ? ['optimizer'] : [])]
  if (offload.length > 0) words.push('--offload', offload.join(','))
  return words.join(' ')
}

/** Names are checked by the library. */
export function readAdapter(values: Values<typeof adapterOptions>): Pick<PlanRequest, 'lora' | 'quantize' | 'pose'> {
  const { lora: rank, 'lora-alpha': alpha, 'lora-targets': targets, 'also-train': also, pose } = values
  for (const name of ['lora-alpha', 'lora-targets', 'also-train'] as const) {
    if (rank === undefined && values[name] !== undefined) {
      throw new UsageError(`--${name} needs --lora: the adapter's rank`)
    }
  }
  if (rank === undefined && values.quantize !== undefined) {
    throw new UsageError('--quantize needs --lora: quantised weights are too coarse to be trained themselves')
  }
  const named = list(targets)
  if (named?.includes('all') && named.length > 1) {
    throw new UsageError(`--lora-targets is "${targets}", but all stands alone: it is every matrix already`)
  }
  const lora = { rank, alpha, targets: named?.[0] === 'all' ? loraTargets : named, alsoTrain: list(also) }
  return {
    ...(rank !== undefined && { lora: defined(lora) as LoraOptions }),
    ...(values.quantize !== undefined && { quantize: values.quantize as 'nf4' | 'int8' }),
    ...(pose !== undefined && { pose: { length: pose } }),
  }
}

const list = (text: string | undefined): string[] | undefined => text?.split(',').map((part) => part.trim())
