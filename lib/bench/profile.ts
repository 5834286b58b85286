// Where the time of a training step goes, operation by operation.
import { readBatch } from '../model/batch.js'
import { parameterShapes, readConfig } from '../model/config.js'
import { Parameters } from '../model/parameters.js'
import { disposePass, recordPass, runPass } from '../model/passes.js'
import { Plan } from '../runtime/plan.js'
import type { Command } from '../runtime/recorder.js'
import { Tensor } from '../runtime/tensor.js'
import { AdamW } from '../train/optimizer.js'
import { randomTokens, randomWeights } from './data.js'
import { openTarget, type Target } from './kernels.js'
import { summarize } from './measure.js'
import type { ModelConfig } from './models.js'

export interface ProfileRow {
  /** An operation, with its sizes where it is a matrix product. */
  op: string
  /** How often it runs in a step. */
  count: number
  /** Median over the sweeps of the time of all `count` together. */
  seconds: number
  flops: number
  /** Bytes read and written. */
  traffic: number
}

/** `matmul_nt 1024 x 512 x 1376`: M, N, K of a product. */
function label({ row, values }: Command): string {
  if (!row.name.startsWith('matmul_')) return row.name
  const [a, , , c] = values as readonly Tensor[]
  const [m, n] = c!.dims as [number, number]
  return `${row.name} ${m} x ${n} x ${a!.size / m}`
}

/**
 * Runs the operations of a step one by one, in the step's order and memory, `sweeps` times; sums up by operation. Each
 * crossing into native code adds some 30 microseconds.
 */
export async function profileStep(
  raw: ModelConfig,
  time: number,
  target: Target,
  sweeps: number,
  signal?: AbortSignal,
): Promise<ProfileRow[]> {
  using device = openTarget(target)
  const config = readConfig({ ...raw, max_position_embeddings: Math.max(time, raw.max_position_embeddings) }, 'bench')
  const weights = new Parameters(device, device.name === 'cpu' ? 'f32' : 'bf16', parameterShapes(config))
  await randomWeights(weights)
  const optimizer = new AdamW(weights.segments(), { betas: [0.9, 0.95], eps: 1e-8, weightDecay: 0, maxGradNorm: 0 })
  await optimizer.reset()
  const { gradients } = optimizer
  const pass = recordPass(device, config, weights, 'gradients', 1, time, { gradients })
  const batch = readBatch(randomTokens(1, time, config.vocabSize), config, {})
  const weight = new Float32Array(time).fill(1 / time)
  await runPass(device, config, pass, batch, weight)
  const steps = pass.plan.commands.map((command) => {
    const values = command.values.map((value) => (value instanceof Tensor ? pass.plan.located(value) : value))
    return { command, plan: new Plan(device, command.row.name, [{ ...command, values }]) }
  })
  const rows = new Map<string, Omit<ProfileRow, 'seconds'> & { sums: number[] }>()
  const add = (op: string, flops: number, traffic: number, sweep: number, seconds: number): void => {
    let row = rows.get(op)
    if (!row) rows.set(op, (row = { op, count: 0, flops: 0, traffic: 0, sums: [] }))
    if (sweep === 0)
      Object.assign(row, { count: row.count + 1, flops: row.flops + flops, traffic: row.traffic + traffic })
    row.sums[sweep] = (row.sums[sweep] ?? 0) + seconds
  }
  const seconds = async (body: () => Promise<unknown>): Promise<number> => {
    const start = performance.now()
    await body()
    return (performance.now() - start) / 1000
  }
  for (let sweep = -1; sweep < sweeps; sweep++) {
    for (const { command, plan } of steps) {
      signal?.throwIfAborted()
      const taken = await seconds(() => plan.run())
      if (sweep >= 0) add(label(command), command.flops, command.traffic, sweep, taken)
    }
    await optimizer.begin(1e-5)
    const taken = await seconds(() => optimizer.end())
    // p, m, v read and written, g read; and g once more for its norm
    if (sweep >= 0) add('update (norm, adamw)', optimizer.flops, 32 * weights.elements, sweep, taken)
  }
  for (const { plan } of steps) plan.dispose()
  disposePass(pass)
  optimizer.dispose()
  return Array.from(rows.values(), ({ sums, ...row }) => ({ ...row, seconds: summarize(sums).median })).sort(
    (a, b) => b.seconds - a.seconds,
  )
}
