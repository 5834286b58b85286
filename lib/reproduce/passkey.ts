import { passkey, type PasskeyResult } from '../index.js'
import { passkeyCharts } from './charts.js'
import { forwardWork, madeBy, type Method, type Plan } from './models.js'
import { rowName, trainUnits } from './perplexity.js'
import { publishedTable } from './published.js'
import { passkeyKey, passkeyOf, stepIds } from './results.js'
import { type Experiment, figure, given, label, none, percent } from './sections.js'
import { windowOf } from './settings.js'
import { leftOutOf, type Unit, unlessTooShort } from './units.js'

export function passkeyUnit(plan: Plan, id: string, context: number): Unit {
  const { settings, window } = plan
  const { distances, trials } = settings.passkey
  return {
    key: passkeyKey(id, context),
    label: `passkey, ${id}, ${context} tokens`,
    work: forwardWork(distances * trials * context, context, window),
    after: madeBy(id),
    async run({ model: load, signal, progress }) {
      const model = await load(id)
      const value = await unlessTooShort(() =>
        passkey(model, {
          ...{ context, distances, trials, seed: settings.seed },
          ...(signal ? { signal } : {}),
          onProgress: ({ done, total }) => progress(done / total),
        }),
      )
      return { value }
    },
  }
}

/** Table 4: k_max over the steps. */
export const table4: Experiment = {
  id: 'table-4',
  title: 'Table 4: effective context by passkey retrieval',
  data: [],
  trains: true,
  units: (plan) => {
    const { settings, window } = plan
    const evaluated = settings.extensions.flatMap(({ factor }) => {
      const methods: Method[] = settings.direct.includes(factor) ? ['direct', 'pi'] : ['pi']
      const context = windowOf(window, factor)
      const tuned = methods.flatMap((method) => stepIds(settings, method, factor).map(({ id }) => id))
      return tuned.map((id) => passkeyUnit(plan, id, context))
    })
    return [...trainUnits(plan), ...evaluated]
  },
  section(folder) {
    const { settings, model } = folder.record
    const { distances, trials } = settings.passkey
    const columns = Array.from({ length: settings.points + 1 }, (_, n) => Math.round((100 * n) / settings.points))
    const lines = settings.extensions.flatMap(({ factor, steps }) => {
      const methods: Method[] = settings.direct.includes(factor) ? ['direct', 'pi'] : ['pi']
      return methods.map((method) => ({ method, factor, steps, window: windowOf(model.window, factor) }))
    })
    const build = (
      id: string,
      caption: string,
      value: (result: PasskeyResult) => number,
      text: (n: number) => string,
    ) => ({
      id,
      caption,
      head: ['model: window, method', 'steps in all', ...columns.map((share) => `${share} %`)],
      rows: lines.map(({ method, factor, steps, window }) => [
        label(rowName(method, window)),
        given(steps),
        ...stepIds(settings, method, factor).map(({ id: model }) => {
          const result = passkeyOf(folder, model, window)
          return result ? figure(value(result), text) : none()
        }),
      ]),
    })
    return {
      id: 'table-4',
      title: this.title,
      text: [
        `A five-digit key in a long irrelevant text, at ${distances} distances k from its end (one of those with the same prompt), ${trials} keys each, greedy ` +
          'decoding. k_max is the largest k such that at least 20 % are found at every distance up to it. Prompts are of ' +
          'the extended window; before any step, direct is the base itself.',
      ],
      tables: [
        build('table-4', 'k_max in tokens, by the share of the steps done', ({ kmax }) => kmax, String),
        build('table-4-accuracy', 'Keys found, at all distances together', ({ accuracy }) => accuracy, percent),
        ...publishedTable('table-4', folder.record.kind),
      ],
      charts: passkeyCharts(folder, lines),
      leftOut: leftOutOf(folder, 'passkey/'),
    }
  },
}
