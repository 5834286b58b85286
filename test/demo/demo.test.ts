// The demo: its texts, its measures, a run with few steps, its page, and how the command ends in bad circumstances.
import { spawn } from 'node:child_process'
import {
  chmodSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import t, { type Test } from 'tap'
import { runCommand } from '../../lib/cli/commands.js'
import { trainBase } from '../../lib/demo/base.js'
import { Corpus, Dice } from '../../lib/demo/data.js'
import { BASE, type DemoResult, METHODS, type Recipe, runDemo } from '../../lib/demo/demo.js'
import { losses, retrieves } from '../../lib/demo/measure.js'
import { page, picture, tableOf } from '../../lib/demo/page.js'
import { trainTokenizer } from '../../lib/demo/tokenizer.js'
import { passkeyPrompt } from '../../lib/eval/passkey.js'
import { loadTokenizer } from '../../lib/files/tokenizer.js'
import { Llama } from '../../lib/index.js'

const root = fileURLToPath(new URL('../..', import.meta.url))
const dir = mkdtempSync(join(tmpdir(), 'ropewalk-demo-'))
t.teardown(() => rmSync(dir, { recursive: true, force: true }))

const tokenizer = await loadTokenizer(BASE)
const corpus = new Corpus(tokenizer)
const tiny: Recipe = {
  ...{ extensions: [{ factor: 2, steps: 2 }], learningRate: 1e-3, texts: 2, trials: 1 },
}

t.test('texts follow from the seed alone, and are what the tokenizer makes of them', async (t) => {
  const mixture = { people: [2, 5], passkeys: 0.4, refrains: 0.3 } as const
  const windows = (seed: number) => {
    const dice = new Dice(seed)
    return Array.from({ length: 40 }, () => corpus.window(dice, 256, mixture))
  }
  t.strictSame(windows(1), windows(1))
  t.notSame(windows(1), windows(2))
  t.ok(
    windows(1).every((row) => row.length === 256 && row[0] === tokenizer.bosId),
    'rows have one length and begin with BOS',
  )
  for (const row of windows(3)) {
    // The last piece may have been cut within a word.
    const again = tokenizer.encode(tokenizer.decode(row.slice(0, 200)))
    t.strictSame(again.slice(0, 190), row.slice(0, 190))
  }
})

t.test("prompts are the paper's, token for token", async (t) => {
  const dice = new Dice(5)
  for (const where of [0, 0.5, 0.999]) {
    const { ids, answer, distance } = corpus.prompt(dice, 300, where)
    const text = tokenizer.decode(ids)
    const key = tokenizer.decode(answer).trim()
    const [before, after] = counts(text, key)
    t.equal(text, passkeyPrompt(key, before, after))
    t.strictSame(tokenizer.encode(text), ids)
    t.match(tokenizer.decode(ids.slice(ids.length - distance)), new RegExp(`^${key}\\. Remember`))
    t.equal(answer.length, 6)
    t.ok(ids.length + answer.length <= 300 && ids.length > 250)
  }
  t.throws(() => corpus.prompt(dice, 40), /needs \d+ tokens, there are 40/)
})

/** Repetitions of the filler before and after the key's line. */
function counts(text: string, key: string): [number, number] {
  const at = text.indexOf(`The pass key is ${key}`)
  const count = (part: string): number => part.split('The grass is green.').length - 1
  return [count(text.slice(0, at)), count(text.slice(at))]
}

t.test('the tokenizer is learned from the text, and refuses more tokens than there are', async (t) => {
  const json = trainTokenizer('low lower lowest low low', 264) as any
  t.equal(Object.keys(json.model.vocab).length, 262)
  t.equal(json.model.merges[0], 'l o', 'the most frequent pair comes first')
  t.throws(() => trainTokenizer('ab', 300), /only 257 tokens to learn/)
})

t.test('retrieval in one pass says the same as greedy decoding', async (t) => {
  using model = await Llama.load(BASE, { dtype: 'float32' })
  const dice = new Dice(11)
  const prompts = Array.from({ length: 6 }, () => corpus.prompt(dice, 256))
  // One key is not what stands in the prompt, so that there is something to miss.
  prompts[2] = { ...prompts[2]!, answer: prompts[3]!.answer }
  const found = await retrieves(model, prompts)
  for (const [i, { ids, answer }] of prompts.entries()) {
    const said: number[] = []
    for await (const { id } of model.generate({ prompt: ids, maxTokens: 6, stopIds: [] })) said.push(id)
    t.equal(said.join() === answer.join(), found[i], `prompt ${i}`)
  }
  t.equal(found[2], false)
  t.ok(found.filter(Boolean).length >= 4, 'the base model finds keys in its own window')
  const [nll] = await losses(model, [prompts[0]!.ids])
  t.equal(nll!.length, prompts[0]!.ids.length - 1)
})

let result: DemoResult

t.test('a run with few steps is complete and repeats itself', async (t) => {
  const seen: number[] = []
  result = await runDemo({ seed: 3, recipe: tiny, onProgress: (done) => seen.push(done) })
  t.strictSame(
    seen,
    [...seen].sort((a, b) => a - b),
    'progress only grows',
  )
  t.ok(Math.abs(seen.at(-1)! - 1) < 1e-9, 'and ends at 1')
  const [extension] = result.extensions
  t.strictSame(
    extension!.methods.map(({ method }) => method),
    METHODS.map(({ method }) => method),
  )
  for (const { method, perplexity, curve, passkeyByContext, passkeyByDistance, training } of extension!.methods) {
    t.strictSame(
      perplexity.map(({ from, to }) => [from, to]),
      [
        [65, 128],
        [129, 256],
        [257, 511],
      ],
    )
    t.ok([...perplexity.map(({ value }) => value), ...curve.map((point) => point.perplexity)].every(Number.isFinite))
    t.equal(curve.length, 32)
    t.strictSame(
      passkeyByContext.map(({ context }) => context),
      [256, 512],
    )
    t.equal(passkeyByDistance.length, 8)
    t.equal(training !== undefined, method === 'tuned' || method === 'direct')
  }
  t.equal(extension!.findings.length, 10)
  const again = await runDemo({ seed: 3, recipe: tiny })
  t.strictSame(again.extensions, result.extensions)
})

t.test('an abort ends the run, whatever is at work', async (t) => {
  for (const phase of [/measuring/, /fine-tuning/]) {
    const controller = new AbortController()
    const onProgress = (_: number, task: string) => phase.test(task) && controller.abort()
    const run = runDemo({ recipe: tiny, signal: controller.signal, onProgress })
    await t.rejects(run, { name: 'AbortError' }, String(phase))
  }
})

t.test('the page is whole, self-contained and small', async (t) => {
  const html = page(result)
  t.ok(Buffer.byteLength(html) < 1 << 20, `${Buffer.byteLength(html)} bytes`)
  t.match(html, /^<!doctype html>\n<html lang="en">/)
  t.notMatch(html, /<script|<link|<img|@import|url\(|src=/)
  t.notMatch(html, /NaN|undefined|Infinity/)
  wellFormed(t, html.replace('<!doctype html>', ''), new Set(['meta', 'br']))
  t.equal(html.match(/role="img"/g)?.length, 2, 'two charts a factor')
  const { head, rows } = tableOf(result.extensions[0]!, 256)
  for (const cell of [...head, ...rows.flat()]) t.ok(html.includes(`>${cell}</t`), cell)
  const svg = picture(result)
  wellFormed(t, svg, new Set())
  t.match(svg, /^<svg xmlns="http:\/\/www.w3.org\/2000\/svg"/)
  t.notMatch(svg, /NaN|undefined/)
})

/** Every element is closed, in order. */
function wellFormed(t: Test, text: string, empty: Set<string>): void {
  const open: string[] = []
  const body = text.replace(/<style>[\s\S]*?<\/style>/g, '')
  for (const [, close, name, self] of body.matchAll(/<(\/?)([a-z0-9]+)[^>]*?(\/?)>/gi)) {
    if (close) t.equal(open.pop(), name, `</${name}>`)
    else if (!self && !empty.has(name!)) open.push(name!)
  }
  t.strictSame(open, [])
  t.notMatch(body.replace(/&(?:#\d+|amp|lt|gt);/g, ''), /&/, 'every & is an entity')
}

t.test('training the base writes a folder that loads, with its curve', async (t) => {
  const folder = join(dir, 'base')
  await trainBase(folder, { scale: 0.001 })
  t.strictSame(readdirSync(dir), ['base'], 'nothing else is left')
  using model = await Llama.load(folder)
  t.equal(model.dtype, 'bfloat16')
  t.equal(model.contextWindow, 256)
  await model.tokenizer()
  const { tokens, curve } = JSON.parse(readFileSync(join(folder, 'training.json'), 'utf8'))
  t.ok(tokens > 0 && curve.length === 3)
  await t.rejects(trainBase(folder, { scale: 0.001, signal: AbortSignal.abort() }), { name: 'AbortError' })
  t.strictSame(readdirSync(dir), ['base'])
})

t.test('the shipped base is small, and says how it was trained', async (t) => {
  const bytes = readdirSync(BASE).reduce((sum, name) => sum + statSync(join(BASE, name)).size, 0)
  t.ok(bytes < 4e6, `${bytes} bytes`)
  const { curve, parameters } = JSON.parse(readFileSync(join(BASE, 'training.json'), 'utf8'))
  t.ok(parameters < 4e6)
  t.ok(curve.at(-1).passkey > 0.9, 'it finds keys in its own window')
})

t.test('a folder that cannot be written is refused at once, in one line', async (t) => {
  const file = join(dir, 'file')
  writeFileSync(file, '')
  const locked = join(dir, 'locked')
  mkdirSync(locked)
  chmodSync(locked, 0o500)
  // Root writes where it likes, so for root there is only the file that stands in the way.
  const cases = process.getuid?.() === 0 ? [file, join(file, 'below')] : [file, join(file, 'below'), locked]
  for (const out of cases) {
    let stderr = ''
    const started = performance.now()
    const code = await runCommand(['demo', '--out', out], {
      stdout: { write: () => t.fail('nothing on stdout') },
      stderr: { write: (text) => (stderr += text) },
    })
    t.equal(code, 1)
    t.match(stderr, new RegExp(`^ropewalk: ${out}: cannot be written \\(.*\\): choose another folder with --out\\n$`))
    t.ok(performance.now() - started < 2000)
  }
})

t.test('Ctrl-C ends the command soon and leaves nothing', async (t) => {
  const out = join(dir, 'interrupted', 'deeper')
  let stderr = ''
  const main = join(root, 'lib/cli/main.ts')
  const child = spawn(process.execPath, [...process.execArgv, main, 'demo', '--out', out], { cwd: dir })
  child.stderr.on('data', (part) => (stderr += part))
  const ended = new Promise<number | null>((resolve) => child.on('close', resolve))
  // The folder is made before anything is computed; a second later the first passes are at work.
  while (!existsSync(out) && child.exitCode === null) await setTimeout(20)
  await setTimeout(1000)
  t.ok(existsSync(out))
  child.kill('SIGINT')
  t.equal(await ended, 130)
  t.match(stderr, /stopped; nothing was written\n$/)
  t.notOk(existsSync(join(dir, 'interrupted')))
})
