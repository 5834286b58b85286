import { needle, type NeedleResult, ruler, type RulerResult, type RulerTask } from '../index.js'
import { rulerTasks } from '../eval/ruler-tasks.js'
import { heatMap } from '../report/cells.js'
import type { ReportRecord } from './folder.js'
import { forwardWork, madeBy, METHODS, nameOf, type Plan } from './models.js'
import { trainUnits } from './perplexity.js'
import { finalId, resultOf } from './results.js'
import { type Experiment, figure, given, label, none, percent, type Table } from './sections.js'
import { doublings, type Settings, timesText, windowOf } from './settings.js'
import { isLeftOut, type LeftOut, leftOutOf, type Unit, unlessTooShort } from './units.js'

/** Beyond the paper: the heat map of length and depth, and RULER's tasks. */

/** The model that was not changed, and both fine-tuned ones, at a factor. */
export function contrasted(settings: Settings, factor: number): string[] {
  const direct = settings.direct.includes(factor) ? [finalId(settings, 'direct', factor)] : []
  return ['base', finalId(settings, 'pi', factor), ...direct]
}

export function modelTitle(id: string): string {
  const { method, factor, step } = nameOf(id)
  const tuned = method === 'base' ? '' : step > 0 ? ` ${timesText(factor)}, tuned` : ` ${timesText(factor)}, not tuned`
  return `${METHODS[method]}${tuned}`
}

/** Each factor's models at its extended window. */
export const pairs = ({
  settings,
  window,
}: {
  settings: Settings
  window: number
}): { id: string; factor: number; context: number }[] =>
  settings.extensions.flatMap(({ factor }) =>
    contrasted(settings, factor).map((id) => ({ id, factor, context: windowOf(window, factor) })),
  )

const view = ({ settings, model }: ReportRecord) => ({ settings, window: model.window })

const needleKey = (id: string, context: number): string => `needle/${id}/${context}`

export const needles: Experiment = {
  id: 'needle',
  title: 'Needle in a haystack: passkeys by length and depth',
  data: [],
  trains: true,
  units: (plan) => [
    ...trainUnits(plan),
    ...pairs(plan).map(({ id, context }): Unit => {
      const { settings, window } = plan
      const { depths, trials } = settings.needle
      const contexts = doublings(window, context)
      return {
        key: needleKey(id, context),
        label: `needle, ${id}, up to ${context}`,
        work: contexts.reduce((sum, length) => sum + forwardWork(depths * trials * length, length, window), 0),
        after: madeBy(id),
        async run({ model: load, signal, progress }) {
          const model = await load(id)
          const value = await unlessTooShort(() =>
            needle(model, {
              ...{ contexts, trials, seed: settings.seed },
              depths: Array.from({ length: depths }, (_, n) => n / (depths - 1)),
              ...(signal ? { signal } : {}),
              onProgress: ({ done, total }) => progress(done / total),
            }),
          )
          return { value }
        },
      }
    }),
  ],
  section(folder) {
    const { settings } = folder.record
    const found = pairs(view(folder.record)).flatMap(({ id, factor, context }) => {
      const result = resultOf<NeedleResult>(folder, needleKey(id, context))
      return result ? [{ id, factor, context, result }] : []
    })
    return {
      id: 'needle',
      title: this.title,
      text: [
        `Prompts of each length, the key at ${settings.needle.depths} depths from the beginning (0 %) to the end (100 %) of the text, ` +
          `${settings.needle.trials} keys a cell.`,
      ],
      tables: [
        {
          id: 'needle',
          caption: 'Keys found, at all lengths and depths together',
          head: ['model', 'longest prompt', 'keys found'],
          rows: found.map(({ id, context, result }) => [
            label(modelTitle(id)),
            given(context),
            figure(result.accuracy, percent),
          ]),
        },
      ],
      charts: found.map(({ id, context, result: { contexts, depths, cells } }) =>
        heatMap({
          title: `${modelTitle(id)}, up to ${context}`,
          x: { label: 'length of the prompt, in tokens', names: contexts.map(String) },
          y: { label: 'depth of the key', names: depths.map(percent) },
          values: depths.map((depth) =>
            contexts.map((length) => cells.find((cell) => cell.context === length && cell.depth === depth)!.accuracy),
          ),
          ...{ min: 0, max: 1, format: percent },
        }),
      ),
      leftOut: leftOutOf(folder, 'needle/'),
    }
  },
}

type RulerUnit = Pick<RulerResult, 'tasks'> | LeftOut

const rulerKey = (task: RulerTask, id: string, context: number): string => `ruler/${task}/${id}/${context}`

function rulerUnit(plan: Plan, task: RulerTask, id: string, context: number): Unit {
  const { settings, window } = plan
  const { trials } = settings.ruler
  return {
    key: rulerKey(task, id, context),
    label: `RULER ${task}, ${id}, ${context}`,
    work: forwardWork(trials * context, context, window),
    after: madeBy(id),
    async run({ model: load, signal, progress }) {
      const model = await load(id)
      const value = await unlessTooShort(async () => {
        const { tasks } = await ruler(model, {
          ...{ context, tasks: [task], trials, seed: settings.seed },
          ...(signal ? { signal } : {}),
          onProgress: ({ done, total }) => progress(done / total),
        })
        return { tasks }
      })
      return { value: value satisfies RulerUnit }
    },
  }
}

const NOTHING =
  'No model gives a single right answer, the unchanged one within its own reach included: the tasks are beyond this model, and ' +
  'these figures say nothing about its extension.'

function nothingFound({ rows }: Table): boolean {
  const scores = rows.flatMap((row) => row.slice(2).flatMap(({ value }) => (typeof value === 'number' ? [value] : [])))
  return scores.length > 0 && scores.every((score) => score === 0)
}

export const rulers: Experiment = {
  id: 'ruler',
  title: 'RULER: retrieval, tracking and counting at the extended window',
  data: [],
  trains: true,
  units: (plan) => [
    ...trainUnits(plan),
    ...pairs(plan).flatMap(({ id, context }) => rulerTasks.map((task) => rulerUnit(plan, task, id, context))),
  ],
  section(folder) {
    const { settings } = folder.record
    const rows = pairs(view(folder.record))
    const at = (task: RulerTask, id: string, context: number) => folder.get<RulerUnit>(rulerKey(task, id, context))
    const left = new Set<string>()
    const table: Table = {
      id: 'ruler',
      caption: 'Score: the share of what is asked for that the answer contains',
      head: ['model', 'window', ...rulerTasks],
      rows: rows.map(({ id, context }) => [
        label(modelTitle(id)),
        given(context),
        ...rulerTasks.map((task) => {
          const unit = at(task, id, context)
          if (isLeftOut(unit)) left.add(`${task} at ${context}: ${unit.leftOut}`)
          return !unit || isLeftOut(unit) ? none() : figure(unit.tasks[0]!.accuracy, percent)
        }),
      ]),
    }
    return {
      id: 'ruler',
      title: this.title,
      text: [
        `RULER's tasks (arXiv 2404.06654), made here; ${settings.ruler.trials} prompts each, greedy decoding. Its list of common words ` +
          '(cwe) is longer from 4096 tokens on, and so is the shortest prompt.',
        ...(nothingFound(table) ? [NOTHING] : []),
      ],
      tables: [table],
      charts: [],
      leftOut: [...left],
    }
  },
}
