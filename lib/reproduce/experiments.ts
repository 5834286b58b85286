import { didYouMean, quote } from '../errors.js'
import { resolution, scoreMaxima } from './attention.js'
import { needles, rulers } from './beyond.js'
import { ablation, baselines } from './compare.js'
import { table5 } from './choice.js'
import { cost } from './cost.js'
import { table4 } from './passkey.js'
import { table1, table2, table3 } from './perplexity.js'
import { positions } from './position.js'
import type { Experiment } from './sections.js'
import { table6 } from './summaries.js'
import { figure2, figure5, theorem } from './theorem.js'

/** In the order of the page. */
export const EXPERIMENTS: readonly Experiment[] = [
  ...[table1, table2, table3, table4, table5, table6],
  ...[theorem, figure2, figure5],
  ...[resolution, scoreMaxima],
  ...[ablation, baselines, cost],
  ...[needles, rulers, positions],
]

/** Those of the ids, all where there are none. Throws RangeError for an id that is unknown. */
export function experimentsOf(only: readonly string[] | undefined): Experiment[] {
  if (!only) return [...EXPERIMENTS]
  const ids = EXPERIMENTS.map(({ id }) => id)
  for (const id of only) {
    if (!ids.includes(id)) {
      throw new RangeError(`there is no experiment ${quote(id)}${didYouMean(id, ids)}; there are ${ids.join(', ')}`)
    }
  }
  return EXPERIMENTS.filter(({ id }) => only.includes(id))
}

/** Data sets that are given by name. */
export const DATA_SETS: Readonly<Record<string, string>> = {
  train: 'texts to fine-tune on (the Pile in the paper)',
  pg19: 'PG-19, test split: a document a file, line or row',
  'proof-pile': 'documents of Proof-pile',
  boolq: 'dev.jsonl',
  piqa: 'valid.jsonl,valid-labels.lst, or rows with labels',
  'race-m': 'RACE, middle: the folder of .txt, or rows',
  'race-h': 'RACE, high',
  winogrande: 'dev.jsonl',
  'gov-report': 'test.jsonl: report and summary',
  'gov-report-train': 'train.jsonl, to fine-tune on',
}

/** Why an experiment cannot be run with what was given; undefined where it can. */
export function missingData(
  { data, someOf, trains }: Experiment,
  given: Readonly<Record<string, unknown>>,
): string | undefined {
  const train = Object.keys(given).some((name) => name === 'train' || name.startsWith('train-'))
  const has = (name: string): boolean => Object.hasOwn(given, name)
  const lacking = [...(trains && !train ? ['train'] : []), ...data.filter((name) => !has(name))]
  const option = (name: string): string => `--data ${name}=<path>`
  const parts = lacking.map(option)
  if (someOf && !someOf.some(has)) parts.push(`one of ${someOf.map(option).join(', ')}`)
  return parts.length === 0 ? undefined : `not run: needs ${parts.join(' and ')}`
}
