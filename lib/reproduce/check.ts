import type { ChoiceItem, ChoiceTask } from '../index.js'
import { choiceTasks, readChoiceItems } from '../eval/choice-items.js'
import { readRows, textField } from '../files/rows.js'
import { documentFiles, readDocuments } from '../files/text.js'
import type { Plan } from './models.js'
import { CORPORA } from './results.js'

/** A PIQA file's labels may come as a file of their own. */
const LABELS = '.lst'

/** The items of a task from the paths of its data set. */
export function readItems(task: ChoiceTask, paths: readonly string[], signal?: AbortSignal): Promise<ChoiceItem[]> {
  const labels = paths.find((path) => path.endsWith(LABELS))
  return readChoiceItems(
    task,
    paths.filter((path) => !path.endsWith(LABELS)),
    { ...(labels === undefined ? {} : { labels }), ...(signal ? { signal } : {}) },
  )
}

/**
 * Reads the named data sets once, whole, so that a file which cannot be read is known before days of fine-tuning. The
 * texts to fine-tune on are left out: the trainer reads all of them before its first step. Throws RopewalkError with
 * file, line and field.
 */
export async function checkData(
  data: Plan['data'],
  names: Iterable<string>,
  signal?: AbortSignal,
  onProgress?: (task: string) => void,
): Promise<void> {
  for (const name of names) {
    const paths = data[name]
    if (!paths) continue
    signal?.throwIfAborted()
    onProgress?.(`reading ${name}`)
    if ((choiceTasks as readonly string[]).includes(name)) await readItems(name as ChoiceTask, paths, signal)
    else if (Object.hasOwn(CORPORA, name)) {
      for await (const _ of readDocuments(paths)) signal?.throwIfAborted()
    } else if (name.startsWith('gov-report')) await checkArticles(paths, signal)
  }
}

/** GovReport's training set is a gigabyte: one row at a time. */
async function checkArticles(paths: readonly string[], signal: AbortSignal | undefined): Promise<void> {
  for (const file of await documentFiles(paths)) {
    for await (const row of readRows(file, ['report', 'summary'])) {
      signal?.throwIfAborted()
      textField(row, 'report')
      textField(row, 'summary')
    }
  }
}
