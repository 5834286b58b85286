import type { LlamaConfig } from '../model/config.js'
import type { Plan } from '../runtime/plan.js'
import type { Command } from '../runtime/recorder.js'
import { Tensor } from '../runtime/tensor.js'
import type { Gpu } from './gpus.js'
import type { AdamW } from './optimizer.js'
import type { TrainingPasses } from './passes.js'

/** Seconds of a step that an operation of a CUDA graph takes at the least. */
const LAUNCH = 4e-6

/** Seconds; estimated, not measured. */
export interface Seconds {
  matmul: number
  attention: number
  /** Operations that are limited by memory. */
  memory: number
  /** Of the optimizer. */
  update: number
  /** For copies from and to the host that computing does not hide. */
  waiting: number
}

export type Rates = Pick<Gpu, 'bandwidth' | 'matmul' | 'attentionForward' | 'attentionBackward' | 'float32' | 'bus'>

/** Of a CPU, in proportion: these only say which of two plans is the faster one. */
export const CPU_RATES: Rates = {
  bandwidth: 30e9,
  matmul: 200e9,
  attentionForward: 180e9,
  attentionBackward: 180e9,
  float32: 200e9,
  bus: 30e9,
}

/**
 * What a step takes if each operation takes the longer of FLOPs / rate and bytes / bandwidth, one after the other, and
 * copies to and from the host run beside them.
 */
export function estimateStep(passes: TrainingPasses, optimizer: AdamW, rates: Rates): Seconds {
  const total: Seconds = { matmul: 0, attention: 0, memory: 0, update: updateSeconds(optimizer, rates), waiting: 0 }
  for (const { plan, runs } of passes.plans) {
    const { matmul, attention, memory, waiting } = passSeconds(plan, rates)
    total.matmul += runs * matmul
    total.attention += runs * attention
    total.memory += runs * memory
    total.waiting += runs * waiting
  }
  return total
}

export const sumOf = ({ matmul, attention, memory, update, waiting }: Seconds): number =>
  matmul + attention + memory + update + waiting

function passSeconds(plan: Plan, rates: Rates): Omit<Seconds, 'update'> {
  const seconds = { matmul: 0, attention: 0, memory: 0, waiting: 0 }
  let now = 0
  let copied = 0
  for (const command of plan.commands) {
    const { name } = command.row
    // Of fused updates: all of the optimizer is in `update`.
    if (/^(adamw|clip|sum_squares)/.test(name)) continue
    if (name === 'copy_start') copied = Math.max(now, copied) + hostBytes(command) / rates.bus
    else if (name === 'copy_wait') {
      seconds.waiting += Math.max(0, copied - now)
      now = Math.max(now, copied)
    } else {
      const kind = /^(matmul|linear_cross)/.test(name)
        ? 'matmul'
        : name.startsWith('attention')
          ? 'attention'
          : 'memory'
      const took = Math.max(command.flops / rateOf(command, rates), command.traffic / rates.bandwidth) + LAUNCH
      seconds[kind] += took
      now += took
    }
  }
  return seconds
}

function rateOf({ row, values }: Command, rates: Rates): number {
  const a = values.find((value): value is Tensor => value instanceof Tensor && value.dtype !== 'i32')
  if (a?.dtype === 'f32') return rates.float32
  if (row.name === 'attention_fwd') return rates.attentionForward
  if (row.name === 'attention_bwd') return rates.attentionBackward
  return rates.matmul
}

const hostBytes = ({ values }: Command): number =>
  values.reduce<number>((sum, value) => (value instanceof Tensor && value.storage.host ? sum + value.bytes : sum), 0)

/** What is on the host is read and written over the bus, beside what is not. */
export function updateSeconds(optimizer: AdamW, { bandwidth, bus }: Rates): number {
  const { device, host } = optimizer.updateTraffic
  return Math.max(device / bandwidth, host / bus)
}

/**
 * Floating-point operations a token by the usual formula, of which MFU is the part of the peak: 2 N forward and 2 N back
 * through N weights, 2 n for the gradients of the n that are trained, and 6 L H D T for the visible half of attention;
 * nothing that is computed again counts.
 */
export function formulaFlops(
  { layers, heads, headDim }: LlamaConfig,
  weights: number,
  trained: number,
  context: number,
): number {
  return 4 * weights + 2 * trained + 6 * layers * heads * headDim * context
}
