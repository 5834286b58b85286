import type { FitSet } from '../index.js'
import { leanestSets } from '../train/fit.js'
import { findGpu } from '../train/gpus.js'

/** One model and context of the paper (arXiv 2306.15595, section 3.1). */
export interface PaperRow {
  model: string
  context: number
  /** What the paper trained it on. */
  paper: string
  /** The leanest set that computes what float32 masters and moments do, all on the device. */
  exact: FitSet
  /** The leanest set of all on the device. */
  leanest: FitSet
  /** The leanest set with checkpoints and optimizer states on the host. */
  offloaded: FitSet
  /** Whether one 80 GB card is enough. */
  card: string
}

const MODELS = ['7b', '13b', '33b', '65b']
const CONTEXTS = [8192, 16384, 32768]

/** 7B, 13B and 33B at 8k took 32 A100s, every other case 128; the cases that the paper has no model of are marked. */
function machines(model: string, context: number): string {
  const absent = (model === '33b' && context > 16384) || (model === '65b' && context > 8192)
  if (absent) return 'not trained'
  return context === 8192 && model !== '65b' ? '32 A100' : '128 A100'
}

/** The paper's table of machines, with what one card needs today. */
export async function paperTable(onRow: (done: number, what: string) => void): Promise<PaperRow[]> {
  const rows: PaperRow[] = []
  const card = findGpu('a100-80g').capacityBytes
  const fits = ({ plan }: FitSet): boolean => plan.requiredBytes <= card
  for (const model of MODELS) {
    for (const context of CONTEXTS) {
      const { exact, leanest, offloaded } = await leanestSets({ model, context, device: 'a100-80g' })
      const ways = [
        [exact, 'exact'],
        [leanest, 'with rounding'],
        [offloaded, 'with the host'],
      ] as const
      const verdict = ways.find(([set]) => fits(set))?.[1] ?? 'no: more cards'
      rows.push({ model, context, paper: machines(model, context), exact, leanest, offloaded, card: verdict })
      onRow(rows.length, `${model}, ${context} tokens`)
    }
  }
  return rows
}
