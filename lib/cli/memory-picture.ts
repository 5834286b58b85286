import type { MemoryPlan } from '../train/planner.js'
import type { Moment } from '../train/timeline.js'

const WIDTH = 920
const HEIGHT = 430
const LEFT = 70
const RIGHT = 206
const TOP = 66
const BOTTOM = 58

/** Layers of the picture from the ground up; colours to be told apart on white, on black and in print. */
const BANDS = [
  { name: 'weights', colour: '#0072b2', of: ({ weights }: Bytes) => weights },
  { name: 'optimizer', colour: '#56b4e9', of: ({ optimizer }: Bytes) => optimizer },
  { name: 'gradients held', colour: '#009e73', of: ({ heldGradients }: Bytes) => heldGradients },
  { name: 'batch, driver', colour: '#8c959f', of: ({ rest }: Bytes) => rest },
  { name: 'checkpoints', colour: '#f0e442', of: ({ checkpoint }: Bytes) => checkpoint },
  { name: 'gradients of a layer', colour: '#cc79a7', of: ({ gradient }: Bytes) => gradient },
  { name: 'activations', colour: '#e69f00', of: ({ activation }: Bytes) => activation },
  { name: 'logits', colour: '#d55e00', of: ({ logits }: Bytes) => logits },
] as const

type Bytes = { weights: number; optimizer: number; heldGradients: number; rest: number } & Moment['bytes']

const STYLE = `text { font: 12px system-ui, sans-serif; fill: #1f2328 }
.title { font-size: 15px; font-weight: 600 }
.faint { fill: #59636e }
.line { stroke: #59636e }
.grid { stroke: #8c959f; stroke-opacity: 0.35 }
.band { stroke: #ffffff; stroke-opacity: 0.6; stroke-width: 0.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .faint { fill: #9198a1 }
  .line { stroke: #9198a1 }
  .band { stroke: #0d1117 }
}`

const escape = (text: string): string =>
  text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;').replaceAll('"', '&quot;')

const round = (value: number): string => String(Math.round(value * 10) / 10)

/** Memory of a step over its operations, stacked by what it is for, under the device's limit. */
export function memoryPicture(plan: MemoryPlan, moments: readonly Moment[]): string {
  const { bytes, limitBytes, peak } = plan
  const { optimizer, batch, workspace, driver } = bytes
  const fixed = {
    weights: bytes.weights + bytes.adapter,
    optimizer,
    heldGradients: bytes.gradients - peak.gradients,
    rest: batch + workspace + driver,
  }
  const columns = moments.map((moment): Bytes => ({ ...fixed, ...moment.bytes }))
  const highest = Math.max(plan.requiredBytes, ...(limitBytes === undefined ? [] : [limitBytes]))
  const step = niceStep(highest / 5)
  const top = Math.ceil((highest * 1.02) / step) * step
  const y = (value: number): number => HEIGHT - BOTTOM - (value / top) * (HEIGHT - BOTTOM - TOP)
  const x = (column: number): number => LEFT + (column / columns.length) * (WIDTH - LEFT - RIGHT)
  const out: string[] = []
  const text = (left: number, at: number, content: string, rest = ''): void => {
    out.push(`<text x="${round(left)}" y="${round(at)}"${rest}>${escape(content)}</text>`)
  }
  const { model, context, batchSize, accumulate, device } = plan
  const windows = `${batchSize} x ${context} tokens${accumulate > 1 ? `, ${accumulate} times` : ''}`
  text(10, 22, `Planned memory of a training step: ${model.name}, ${windows}`, ' class="title"')
  text(10, 42, describeOptions(plan), ' class="faint"')
  for (let value = 0; value <= top; value += step) {
    out.push(`<path d="M${LEFT} ${round(y(value))}H${WIDTH - RIGHT}" class="grid"/>`)
    text(LEFT - 8, y(value) + 4, `${Number((value / 1e9).toPrecision(3))} GB`, ' text-anchor="end" class="faint"')
  }
  const ground = columns.map(() => 0)
  const present = BANDS.filter(({ of }) => columns.some((column) => of(column) > 0))
  for (const { colour, of } of present) {
    const before = [...ground]
    columns.forEach((column, i) => (ground[i]! += of(column)))
    const upper = ground.map((value, i) => `${i === 0 ? 'M' : 'L'}${round(x(i))} ${round(y(value))}H${round(x(i + 1))}`)
    const lower = before.map((value, i) => `L${round(x(i + 1))} ${round(y(value))}H${round(x(i))}`).reverse()
    out.push(`<path d="${upper.join('')}${lower.join('')}Z" fill="${colour}" class="band"/>`)
  }
  present.toReversed().forEach(({ name, colour, of }, i) => {
    const at = TOP + 10 + 21 * i
    out.push(`<rect x="${WIDTH - RIGHT + 14}" y="${at}" width="13" height="13" fill="${colour}"/>`)
    text(WIDTH - RIGHT + 33, at + 11, `${name} ${gigabytes(Math.max(...columns.map(of)))}`)
  })
  if (limitBytes !== undefined) {
    const at = y(limitBytes)
    out.push(
      `<path d="M${LEFT} ${round(at)}H${WIDTH - RIGHT}" class="line" stroke-width="1.5" stroke-dasharray="7 4"/>`,
    )
    text(LEFT + 6, at - 5, `${device?.name ?? 'limit'}: ${gigabytes(limitBytes)}`)
  }
  // Where the way back begins, and the moment of most.
  const turn = moments.findIndex(({ phase }) => phase === 'backward')
  if (turn > 0) out.push(`<path d="M${round(x(turn))} ${TOP}V${HEIGHT - BOTTOM}" class="line" stroke-dasharray="2 4"/>`)
  text(x(turn / 2), HEIGHT - BOTTOM + 18, 'forward', ' text-anchor="middle" class="faint"')
  text(x((turn + columns.length) / 2), HEIGHT - BOTTOM + 18, 'backward', ' text-anchor="middle" class="faint"')
  const most = `most: ${gigabytes(plan.requiredBytes)} at ${peak.operation} of ${peak.part}, ${peak.phase}`
  text(LEFT, HEIGHT - 14, `operations of the step, in order; ${most}`, ' class="faint"')
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${WIDTH}" height="${HEIGHT}" viewBox="0 0 ${WIDTH} ${HEIGHT}" role="img">
<title>${escape(`Planned memory of a training step: ${model.name}, ${windows}`)}</title>
<style>${STYLE}</style>
${out.join('\n')}
</svg>
`
}

function describeOptions({ memory, lora, dtype }: MemoryPlan): string {
  const { checkpointLayers, keepAttention, mlpRows, attentionGroups, gradients, masters, moments } = memory
  const parts = [checkpointLayers > 0 ? `a checkpoint ${every(checkpointLayers)}` : 'all activations kept']
  if (lora) parts.unshift(`LoRA of rank ${lora.rank}`)
  if (keepAttention) parts.push('attention kept')
  if (mlpRows > 0) parts.push(`MLP in ${mlpRows} rows`)
  if (attentionGroups > 1) parts.push(`attention in ${attentionGroups} groups`)
  if (memory.offloadCheckpoints) parts.push('checkpoints on the host')
  parts.push(`gradients ${gradients}`)
  if (dtype === 'bfloat16' && lora?.alsoTrain.length !== 0) parts.push(`masters ${masters}`)
  parts.push(`moments ${moments}`)
  if (memory.offloadOptimizer) parts.push('optimizer on the host')
  return parts.join(', ')
}

const every = (layers: number): string => (layers === 1 ? 'a layer' : `every ${layers} layers`)

const gigabytes = (bytes: number): string =>
  bytes < 1e8 ? `${(bytes / 1e6).toPrecision(2)} MB` : `${(bytes / 1e9).toFixed(bytes < 1e10 ? 2 : 1)} GB`

/** 1, 2 or 5 times a power of ten, at least `least`. */
function niceStep(least: number): number {
  const power = 10 ** Math.floor(Math.log10(least))
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= least)!
}
