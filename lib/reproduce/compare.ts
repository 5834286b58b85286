import type { ReportFolder } from './folder.js'
import { idOf, METHODS, type Method, type Plan, trainUnit } from './models.js'
import { passkeyUnit, table4 } from './passkey.js'
import { perplexityUnit, table1, table3 } from './perplexity.js'
import { passkeyOf, perplexityOf } from './results.js'
import { type Experiment, figure, given, label, percent, perplexityText, signed } from './sections.js'
import { extensionOf, type Settings, timesText, windowOf } from './settings.js'
import { leftOutOf } from './units.js'

/** The methods at one factor: without fine-tuning, and with the same steps. */
export function comparedModels(settings: Settings): { method: Method; step: number; id: string }[] {
  const factor = settings.compared
  const { steps } = extensionOf(settings, factor)
  const untuned: Method[] = ['base', 'pi', 'ntk', 'dynamic', 'yarn']
  const tuned: Method[] = [
    ...(settings.direct.includes(factor) ? ['direct' as const] : []),
    'pi',
    ...settings.comparedTuned,
  ]
  return [
    ...untuned.map((method) => ({ method, step: 0, id: idOf({ method, factor, step: 0 }) })),
    ...tuned.map((method) => ({ method, step: steps, id: idOf({ method, factor, step: steps }) })),
  ]
}

const CORPUS = 'pg19'

export const baselines: Experiment = {
  id: 'baselines',
  title: 'Baselines: all methods in one run',
  data: [CORPUS],
  trains: true,
  units(plan) {
    const { settings, window } = plan
    const context = windowOf(window, settings.compared)
    const models = comparedModels(settings)
    return [
      ...models.filter(({ step }) => step > 0).map(({ method }) => trainUnit(plan, method, settings.compared)),
      ...models.flatMap(({ id }) => [
        perplexityUnit(plan, CORPUS, id, window),
        perplexityUnit(plan, CORPUS, id, context),
        passkeyUnit(plan, id, context),
      ]),
    ]
  },
  section(folder) {
    const { settings, model } = folder.record
    const context = windowOf(model.window, settings.compared)
    const rows = comparedModels(settings).map(({ method, step, id }) => {
      const [near, far] = [model.window, context].map((window) => perplexityOf(folder, CORPUS, id, window))
      const keys = passkeyOf(folder, id, context)
      return [
        label(`${METHODS[method]}${method === 'base' ? ', extrapolated' : ''}`),
        given(step),
        figure(near?.perplexity, perplexityText),
        figure(far?.perplexity, perplexityText),
        figure(keys?.kmax, String),
        figure(keys?.accuracy, percent),
      ]
    })
    const head = ['method', 'steps', `PG-19, window ${model.window}`, `window ${context}`, 'k_max', 'keys found']
    return {
      id: 'baselines',
      title: this.title,
      text: [
        `From ${model.window} to ${context} tokens (${timesText(settings.compared)}). All were measured on the same texts and prompts, ` +
          'and all that were fine-tuned saw the same windows in the same order. Dynamic NTK is for use without fine-tuning.',
      ],
      tables: [{ id: 'baselines', caption: 'Perplexity, and passkeys at the extended window', head, rows }],
      charts: [],
      leftOut: leftOutOf(folder, `perplexity/${CORPUS}/`),
      notAsked: (['ntk', 'yarn'] as const)
        .filter((method) => !settings.comparedTuned.includes(method))
        .map((method) => `${METHODS[method]}, fine-tuned (--tune ${method})`),
    }
  },
}

const quotient = (a: number | undefined, b: number | undefined): number | undefined =>
  a === undefined || b === undefined ? undefined : a / b - 1

export const ablation: Experiment = {
  id: 'ablation',
  title: 'Ablation: the factor at a fixed budget of fine-tuning',
  data: [CORPUS],
  trains: true,
  units: (plan: Plan) => [...table1.units(plan), ...table3.units(plan), ...table4.units(plan)],
  section(folder: ReportFolder) {
    const { settings, model } = folder.record
    const base = perplexityOf(folder, CORPUS, 'base', model.window)?.perplexity
    const rows = settings.extensions.map(({ factor, steps, batchSize, accumulate }) => {
      const context = windowOf(model.window, factor)
      const [raw, tuned] = [0, steps].map((step) => idOf({ method: 'pi', factor, step })) as [string, string]
      const near = perplexityOf(folder, CORPUS, tuned, model.window)?.perplexity
      const far = perplexityOf(folder, CORPUS, tuned, context)?.perplexity
      const keys = passkeyOf(folder, tuned, context)
      return [
        label(timesText(factor)),
        given(steps),
        given(steps * batchSize * accumulate * context),
        figure(perplexityOf(folder, CORPUS, 'base', context)?.perplexity, perplexityText),
        figure(perplexityOf(folder, CORPUS, raw, context)?.perplexity, perplexityText),
        figure(far, perplexityText),
        figure(near, perplexityText),
        figure(quotient(near, base), signed),
        figure(keys && keys.kmax / context, percent),
        figure(keys?.accuracy, percent),
      ]
    })
    const budgets = new Set(rows.map((row) => row[2]!.value))
    const same =
      budgets.size === 1
        ? `on the same ${[...budgets][0]} tokens`
        : 'on the tokens named: not the same at every factor, which is to be kept in mind where they are fewer'
    return {
      id: 'ablation',
      title: this.title,
      text: [
        `PI at each factor s, fine-tuned ${same}. The far window is s times the original one. The change is that of ` +
          'perplexity at the original window, against the model before any extension.',
      ],
      tables: [
        {
          id: 'ablation',
          caption: 'PI by factor, PG-19 and passkeys',
          head: [
            ...['s', 'steps', 'tokens', 'far, no change', 'far, PI before tuning', 'far, PI tuned'],
            ...['original window, PI tuned', 'change there', 'k_max / window', 'keys found'],
          ],
          rows,
        },
      ],
      charts: [],
      leftOut: [],
    }
  },
}
