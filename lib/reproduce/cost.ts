import { Trainer } from '../index.js'
import { uniform } from '../model/generate.js'
import type { ReportFolder } from './folder.js'
import { idOf, median, METHODS, type Plan, trainingWork } from './models.js'
import { cell, type Experiment, figure, label, none } from './sections.js'
import { extensionOf, windowOf } from './settings.js'

/** What interpolation costs: the same steps with and without it, in turn. */

interface CostUnit {
  context: number
  steps: number
  /** Planned bytes and operations of a step. */
  memory: Record<'pi' | 'direct', number>
  flops: Record<'pi' | 'direct', number>
}

interface CostTime {
  /** Of each step, in seconds, the first of each left out. */
  steps: Record<'pi' | 'direct', number[]>
}

const COSTS = ['pi', 'direct'] as const
const KEY = 'cost'

async function measure(plan: Plan, bench: Parameters<ReturnType<typeof unitOf>['run']>[0]) {
  const { settings, window } = plan
  const factor = settings.compared
  const context = windowOf(window, factor)
  const models = { pi: await bench.load(idOf({ method: 'pi', factor, step: 0 })), direct: undefined as never }
  try {
    models.direct = (await bench.load(idOf({ method: 'direct', factor, step: 0 }))) as never
    const trainers = COSTS.map((method) => {
      const { learningRate } = settings
      return { method, trainer: new Trainer(models[method], { context, learningRate, memory: 'auto' }) }
    })
    const planned = trainers.map(({ method, trainer }) => ({ method, plan: trainer.plan() }))
    const random = uniform(settings.seed)
    const times: CostTime['steps'] = { pi: [], direct: [] }
    for (let step = 0; step <= settings.costSteps; step++) {
      bench.signal?.throwIfAborted()
      const row = Array.from({ length: context }, () => Math.floor(random() * models.pi.config.vocabSize))
      for (const { method, trainer } of trainers) {
        const { seconds } = await trainer.step([row])
        // The first one allocates.
        if (step > 0) times[method].push(seconds)
      }
      bench.progress(step / settings.costSteps)
    }
    for (const { trainer } of trainers) trainer.dispose()
    const of = (value: (plan: (typeof planned)[number]['plan']) => number) =>
      Object.fromEntries(planned.map((entry) => [entry.method, value(entry.plan)])) as Record<'pi' | 'direct', number>
    const value: CostUnit = {
      ...{ context, steps: settings.costSteps },
      memory: of(({ totalBytes }) => totalBytes),
      flops: of(({ flopsPerStep }) => flopsPerStep),
    }
    return { value, time: { steps: times } }
  } finally {
    models.pi.dispose()
    ;(models.direct as { dispose(): void } | undefined)?.dispose()
  }
}

const unitOf = (plan: Plan) => ({
  key: KEY,
  label: 'cost of a step',
  work: trainingWork(
    { factor: 1, steps: 2 * (plan.settings.costSteps + 1), batchSize: 1, accumulate: 1 },
    windowOf(plan.window, plan.settings.compared),
    plan.window,
  ),
  run: (bench: import('./units.js').Bench) => measure(plan, bench),
})

export const cost: Experiment = {
  id: 'cost',
  title: 'What interpolation costs: time and memory of a step',
  data: [],
  trains: false,
  units: (plan) => [unitOf(plan)],
  section(folder: ReportFolder) {
    const { settings, model } = folder.record
    const unit = folder.get<CostUnit>(KEY)
    const time = folder.times.get(KEY) as CostTime | undefined
    const pi = time && median(time.steps.pi)
    const rows = COSTS.map((method) => {
      const seconds = time && median(time.steps[method])
      return [
        label(method === 'pi' ? METHODS.pi : 'no interpolation'),
        figure(unit?.memory[method], (bytes) => `${(bytes / 1e6).toFixed(1)} MB`),
        figure(unit?.flops[method], (flops) => `${(flops / 1e9).toFixed(2)} GFLOP`),
        figure(seconds, (value) => `${(1000 * value).toFixed(1)} ms`),
        pi === undefined || seconds === undefined ? none() : cell(pi / seconds, (pi / seconds).toFixed(3)),
      ]
    })
    const { factor } = extensionOf(settings, settings.compared)
    return {
      id: 'cost',
      title: this.title,
      text: [
        `Training steps of one window of ${windowOf(model.window, factor)} tokens, with positions divided by ${factor} and ` +
          `without, in turn; medians of ${settings.costSteps}. Other work ran beside them where the report was made in ` +
          'several lanes. Memory and operations are those of the recorded step.',
      ],
      tables: [
        {
          id: 'cost',
          caption: 'A training step',
          head: ['positions', 'memory', 'operations', 'time', 'time of PI / time'],
          rows,
        },
      ],
      charts: [],
      leftOut: [],
    }
  },
}
