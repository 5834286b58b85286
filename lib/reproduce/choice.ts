import { basename } from 'node:path'
import { type ChoiceItem, type ChoiceResult, type ChoiceTask, multipleChoice } from '../index.js'
import { readItems } from './check.js'
import { forwardWork, madeBy, type Plan } from './models.js'
import { rowName, rowsOf, targetOf, trainUnits } from './perplexity.js'
import { publishedTable } from './published.js'
import { type Experiment, figure, label, percent1, type Table } from './sections.js'
import type { Unit } from './units.js'

/** Table 5: multiple choice within the original window. */

const TASKS: Record<ChoiceTask, string> = {
  ...{ boolq: 'BoolQ', piqa: 'PIQA', 'race-m': 'RACE-M', 'race-h': 'RACE-H', winogrande: 'WinoGrande' },
}
const TASK_NAMES = Object.keys(TASKS) as ChoiceTask[]

const choiceKey = (task: ChoiceTask, id: string): string => `choice/${task}/${id}`

const readings = new WeakMap<Plan, Map<ChoiceTask, Promise<ChoiceItem[]>>>()

function itemsOf(plan: Plan, task: ChoiceTask): Promise<ChoiceItem[]> {
  const known = readings.get(plan) ?? new Map<ChoiceTask, Promise<ChoiceItem[]>>()
  readings.set(plan, known)
  const reading = known.get(task) ?? someItems(plan, task)
  known.set(task, reading)
  return reading
}

async function someItems({ data, settings }: Plan, task: ChoiceTask): Promise<ChoiceItem[]> {
  const items = await readItems(task, data[task]!)
  // The folder that a file lies in is no part of the result.
  return items.slice(0, settings.choiceItems ?? undefined).map((item) => ({ ...item, source: basename(item.source) }))
}

function choiceUnit(plan: Plan, task: ChoiceTask, id: string): Unit {
  const { settings, window } = plan
  return {
    key: choiceKey(task, id),
    label: `${TASKS[task]}, ${id}`,
    // Of a whole set only the file could tell; this is for the progress bar.
    work: forwardWork((settings.choiceItems ?? 1000) * window, window, window),
    after: madeBy(id),
    async run({ model: load, signal, progress }) {
      const value = await multipleChoice(await load(id), await itemsOf(plan, task), {
        // All within the original window, whatever the model's is.
        maxLength: window,
        ...(signal ? { signal } : {}),
        onProgress: ({ done, total }) => progress(done / total),
      })
      return { value: value satisfies ChoiceResult }
    },
  }
}

/** Share of the items whose right answer is the one that is right most often: a constant answer's accuracy. */
function commonest({ records }: ChoiceResult): number {
  const counts = new Map<number, number>()
  for (const { gold } of records) counts.set(gold, (counts.get(gold) ?? 0) + 1)
  return Math.max(...counts.values()) / records.length
}

export const table5: Experiment = {
  id: 'table-5',
  title: 'Table 5: zero-shot tasks within the original window',
  data: [],
  someOf: TASK_NAMES,
  trains: true,
  units: (plan) => [
    ...trainUnits(plan),
    ...rowsOf(plan).flatMap(({ id }) =>
      TASK_NAMES.filter((task) => plan.data[task]).map((task) => choiceUnit(plan, task, id)),
    ),
  ],
  section(folder) {
    const { settings, model, kind, data } = folder.record
    const rows = rowsOf({ settings, window: model.window })
    const at = (task: ChoiceTask, id: string) => folder.get<ChoiceResult>(choiceKey(task, id))
    const build = (suffix: string, caption: string, value: (result: ChoiceResult) => number | undefined): Table => ({
      id: `table-5${suffix}`,
      caption,
      head: ['model: window, method', ...Object.values(TASKS)],
      rows: rows.map(({ method, factor, id }) => [
        label(rowName(method, targetOf(folder.record, factor))),
        ...TASK_NAMES.map((task) => {
          const result = at(task, id)
          return figure(result && value(result), percent1)
        }),
      ]),
    })
    const counts = TASK_NAMES.flatMap((task) => {
      const result = at(task, 'base')
      return result ? [`${TASKS[task]} ${result.items}${result.truncated > 0 ? ` (${result.truncated} cut)` : ''}`] : []
    })
    const always = TASK_NAMES.flatMap((task) => {
      const result = at(task, 'base')
      return result ? [`${TASKS[task]} ${percent1(commonest(result))}`] : []
    })
    const own =
      kind === 'miniature'
        ? ' The questions are about the generated people of the text before them; the model never saw any of this form.'
        : ''
    return {
      id: 'table-5',
      title: this.title,
      text: [
        'Scored as EleutherAI’s lm-evaluation-harness does: the log-likelihood of each choice behind the prompt, the largest ' +
          `wins (acc); divided by the choice’s characters in the second table (acc_norm).${own}`,
        `Items: ${counts.join(', ')}. By chance: 50 % of BoolQ, PIQA and WinoGrande, 25 % of RACE.` +
          (always.length > 0 ? ` With the commonest answer always: ${always.join(', ')}.` : ''),
      ],
      tables: [
        build('', 'Accuracy (acc)', ({ acc }) => acc),
        build('-norm', 'Accuracy by characters (acc_norm)', ({ accNorm }) => accNorm),
        build('-error', 'Standard error of acc', ({ accStandardError }) => accStandardError),
        ...publishedTable('table-5', kind),
      ],
      charts: [],
      leftOut: [],
      notAsked: TASK_NAMES.filter((task) => !data[task]).map((task) => `${TASKS[task]} (--data ${task}=<path>)`),
    }
  },
}
