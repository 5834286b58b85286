import { choiceTasks } from '../eval/choice-items.js'
import { type ChoiceResult, type ChoiceTask, multipleChoice, readChoiceItems } from '../index.js'
import { baseline, evaluate } from './eval.js'
import { type Command, commonOptions, defined, useOptions } from './options.js'
import type { Output } from './output.js'

const options = {
  task: { kind: 'text', value: 'name', choices: choiceTasks, required: true, help: 'what the data are' },
  data: { kind: 'texts', value: 'file', required: true, help: 'items: .jsonl, .parquet; of RACE the folder of .txt' },
  labels: { kind: 'text', value: 'file', help: "PIQA's file of labels, a line an item" },
  'max-length': {
    kind: 'number',
    value: 'n',
    min: 1,
    whole: true,
    help: 'tokens after which the beginning of an item is cut off',
    default: "the model's window",
  },
  'batch-tokens': { kind: 'number', value: 'n', min: 1, whole: true, help: 'tokens in one pass', default: '2048' },
  'refuse-long': { kind: 'flag', help: 'end with an error where an item is too long, in place of cutting it' },
  records: { kind: 'flag', help: 'with --json, also what came of each item' },
  baseline,
  ...useOptions,
  ...commonOptions,
} as const

export const evalChoice: Command<typeof options> = {
  name: 'eval choice',
  summary: 'Asks questions with given answers: BoolQ, PIQA, RACE, WinoGrande, zero-shot.',
  details:
    'Prompts and scoring are those of lm-evaluation-harness. acc: the right answer has the largest log-likelihood; acc_norm:\n' +
    'by its length in characters; acc_bytes: in bytes. Each with its standard error. The harness publishes acc_norm for PIQA.',
  examples: [
    'ropewalk eval choice ./llama-8k --task piqa --data valid.jsonl --labels valid-labels.lst',
    'ropewalk eval choice ./llama-8k --task race-m --data RACE/test --baseline',
  ],
  operands: ['model'],
  options,
  async run({ operands: [path], values }, output) {
    const task = values.task as ChoiceTask
    const items = await readChoiceItems(task, values.data, defined({ labels: values.labels }))
    const settings = defined({ maxLength: values['max-length'], batchTokens: values['batch-tokens'] })
    const tooLong = values['refuse-long'] ? 'refuse' : 'truncate'
    const results = await evaluate(path!, values, output, async (model, label) => {
      let progress: ReturnType<Output['progress']> | undefined
      try {
        return await multipleChoice(model, items, {
          ...settings,
          tooLong,
          onProgress({ done, total, acc }) {
            progress ??= output.progress(`${label}, ${task}`, total)
            progress.update(done, `acc ${percent(acc)}`)
          },
        })
      } finally {
        progress?.end()
      }
    })
    const rows = [
      ['model', ...figures(results.model)],
      ...(results.baseline ? [['baseline', ...figures(results.baseline)]] : []),
    ]
    output.table(['', 'items', 'acc', 'acc_norm', 'acc_bytes', 'cut'], rows)
    const { truncated } = results.model
    if (truncated > 0)
      output.note(`longer than the window, with their beginning cut off: ${truncated} of ${items.length} items`)
    const value = ({ records, ...rest }: ChoiceResult) => (values.records ? { ...rest, records } : rest)
    const baselineValue = results.baseline && value(results.baseline)
    output.value({ model: path, task, result: value(results.model), baseline: baselineValue })
  },
}

const percent = (share: number): string => `${(100 * share).toFixed(1)} %`

function figures(result: ChoiceResult): (string | number)[] {
  const of = (share: number, error: number | undefined): string =>
    percent(share) + (error === undefined ? '' : ` +- ${(100 * error).toFixed(1)}`)
  return [
    result.items,
    of(result.acc, result.accStandardError),
    of(result.accNorm, result.accNormStandardError),
    of(result.accBytes, result.accBytesStandardError),
    result.truncated,
  ]
}
