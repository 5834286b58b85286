import { spawn } from 'node:child_process'
import { cpSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'
import { formatDuration, formatNumber, Output } from '../../lib/cli/output.js'
import { version } from '../../lib/index.js'
import { fixtures } from '../golden.js'
import { type Result, ropewalk } from './command.js'

const root = fileURLToPath(new URL('../..', import.meta.url))
const dir = mkdtempSync(join(tmpdir(), 'ropewalk-cli-'))
t.teardown(() => rmSync(dir, { recursive: true, force: true }))
// Tokenised data are cached; nothing of a test may stay in the user's cache.
process.env.XDG_CACHE_HOME = join(dir, 'cache')

const model = join(fixtures, 'gqa-linear4-f32')
const text = join(dir, 'text.txt')
writeFileSync(text, readFileSync(join(fixtures, 'README.md'), 'utf8').repeat(2))

/** The only line of a failure, after one that says why `auto` is not a GPU where a model was loaded. */
const reason = ({ stdout, stderr }: Result): string => {
  t.equal(stdout, '', 'nothing on stdout')
  t.match(stderr, /^(on the CPU: CUDA backend unavailable: [^\n]+\n)?ropewalk: [^\n]+\n$/, 'one line on stderr')
  return stderr
}

const commands = [
  'extend',
  'eval perplexity',
  'eval passkey',
  'eval choice',
  'eval summaries',
  'eval needle',
  'eval ruler',
  'generate',
  'inspect',
  'plan',
  'doctor',
  'bench',
  'demo',
  'reproduce',
  'build',
]

t.test('help and version', async (t) => {
  t.equal((await ropewalk('--version')).stdout, `${version}\n`)
  const overview = await ropewalk('help')
  t.equal(overview.code, 0)
  t.same(await ropewalk(), overview)
  t.same(await ropewalk('--help'), overview)
  for (const command of commands) {
    t.match(overview.stdout, `  ${command} `)
    const { code, stdout, stderr } = await ropewalk(...command.split(' '), '--help')
    t.same([code, stderr], [0, ''], command)
    t.match(stdout, new RegExp(`^Usage: ropewalk ${command} .*Options:.*--json.*Examples:`, 's'))
    t.ok(
      stdout.split('\n').every((line) => line.length <= 120),
      `${command}: lines of at most 120 characters`,
    )
    t.equal((await ropewalk('help', ...command.split(' '))).stdout, stdout)
  }
})

t.test('help of eval lists its commands', async (t) => {
  const { code, stdout, stderr } = await ropewalk('eval', '--help')
  t.same([code, stderr], [0, ''])
  const group = commands.filter((name) => name.startsWith('eval '))
  for (const name of group) t.match(stdout, new RegExp(`^  ${name} +[A-Z].*\\.$`, 'm'))
  t.notMatch(stdout, '  extend ')
  t.equal((await ropewalk('help', 'eval')).stdout, stdout)
  const bare = await ropewalk('eval')
  t.equal(bare.code, 2)
  for (const name of group) t.match(bare.stderr, `ropewalk ${name}`)
})

t.test('command lines that cannot be understood end with code 2 and the reason', async (t) => {
  const out = join(dir, 'never')
  const extend = ['extend', model, '--context', '512', '--out', out]
  for (const [args, expected] of [
    [['extnd'], /there is no command "extnd"; did you mean "extend"\?/],
    [['eval'], /"eval" needs a second word: ropewalk eval perplexity, ropewalk eval passkey, .*ropewalk eval needle/],
    [['eval', 'passkeys'], /no command "eval passkeys"; did you mean "eval passkey"\?/],
    [['generate', model], /--prompt is missing/],
    [['generate'], /<model> is missing: ropewalk generate <model> --prompt <text>/],
    [['generate', model, '--promt', 'x'], /unknown option "--promt"; did you mean "--prompt"\?/],
    [['generate', model, '--prompt'], /--prompt needs a value/],
    [
      ['generate', model, '--prompt', 'x', '--top-p', '1.5'],
      /--top-p is "1.5", but must be a number above 0 and at most 1/,
    ],
    [
      ['generate', model, '--prompt', 'x', '--top-p', '0'],
      /--top-p is "0", but must be a number above 0 and at most 1/,
    ],
    [
      ['generate', model, '--prompt', 'x', '--threads', '0'],
      /--threads is "0", but must be a whole number from 1 to 1024/,
    ],
    [['generate', model, '--prompt', 'x', '--max-tokens', 'ten'], /--max-tokens is "ten", but must be a whole number/],
    [['generate', model, '--prompt', 'x', '--max-tokens', '2.5'], /--max-tokens is "2.5", but must be a whole number/],
    [['generate', model, '--prompt', 'x', '--prompt', 'y'], /--prompt is given twice/],
    [['generate', model, '--prompt', 'x', '--json=yes'], /--json takes no value/],
    [['generate', model, '--prompt', 'x', '--dtype', 'bfloat'], /--dtype is "bfloat"; did you mean "bfloat16"\?/],
    [['inspect', model, 'another'], /"another" is one argument too many/],
    [['eval', 'perplexity', model, '--data', text, '--windows', '64,x'], /--windows is "x"/],
    [['eval', 'perplexity', model], /--data is missing/],
    [extend, /--data is missing/],
    [[...extend, '--data', text, '--prompt-field', 'p'], /--prompt-field and --completion-field belong together/],
    [['eval', 'choice', model, '--task', 'piqua', '--data', text], /--task is "piqua"; did you mean "piqa"\?/],
    [[...extend, '--lr', '-1', '--data', text], /--lr is "-1", but must be a number of at least 0/],
    [[...extend, '--steps', '0', '--context', '128'], /--context is given twice/],
    [['extend', model, '--context', '128', '--out', out, '--steps', '0'], /has 128 tokens already/],
    [
      [...extend, '--steps', '0', '--factor', '2'],
      /--factor 2 makes the window 256, but --context is 512.* at least 4/,
    ],
  ] as const) {
    const result = await ropewalk(...args)
    t.equal(result.code, 2, args.join(' ').slice(-60))
    t.match(reason(result), expected)
  }
  t.notOk(existsSync(out))
})

t.test('failures end with code 1 and the reason', async (t) => {
  const missing = join(dir, 'missing')
  for (const args of [
    ['inspect', missing],
    ['generate', missing, '--prompt', 'x'],
    ['eval', 'passkey', missing],
    ['eval', 'perplexity', missing, '--data', text],
    ['extend', missing, '--context', '512', '--data', text, '--out', join(dir, 'never')],
  ]) {
    const result = await ropewalk(...args)
    t.equal(result.code, 1, args.slice(0, 2).join(' '))
    t.match(reason(result), `${missing}: no such folder`)
  }
  const noText = await ropewalk('eval', 'perplexity', model, '--data', join(dir, 'none.txt'))
  t.equal(noText.code, 1)
  t.match(reason(noText), /none\.txt: does not exist/)
  const short = await ropewalk('eval', 'perplexity', model, '--data', text, '--windows', '100000')
  t.match(reason(short), /text\.txt has \d+ tokens, but a window of 100000 needs 99999/)
  t.match(reason(await ropewalk('eval', 'passkey', model, '--context', '64')), /without any filler/)
  t.match(reason(await ropewalk('generate', model, '--prompt', 'x', '--device', 'cud')), /did you mean "cuda"/)

  process.env.ROPEWALK_DEBUG = '1'
  const debug = await ropewalk('inspect', missing)
  delete process.env.ROPEWALK_DEBUG
  t.match(debug.stderr, /\n\s+at .*folder/, 'the stack, where it is asked for')
})

t.test('doctor', async (t) => {
  const { code, stdout } = await ropewalk('doctor')
  t.equal(code, 0)
  t.match(stdout, /ok  node .*ok  platform .*ok  addon .*ok  cpu .*ok  self-check.*largest error/s)
  t.match(stdout.trimEnd().split('\n').at(-1)!, /^ready\. Next: ropewalk/)
  const report = JSON.parse((await ropewalk('doctor', '--json')).stdout)
  t.match(report, { ok: true, version, verdict: /ready/ })
  t.ok(report.checks.every(({ ok }: { ok: boolean }) => ok))
})

t.test('doctor says why there is no GPU, or which there are', async (t) => {
  const { ROPEWALK_SIMT_LIBRARY: simt, ROPEWALK_CUDA_LIBRARY: before } = process.env
  t.teardown(() => {
    if (before === undefined) delete process.env.ROPEWALK_CUDA_LIBRARY
    else process.env.ROPEWALK_CUDA_LIBRARY = before
    delete process.env.ROPEWALK_SIMT_MACHINE
  })
  process.env.ROPEWALK_CUDA_LIBRARY = '/nowhere/lib.so'
  const without = await ropewalk('doctor')
  t.equal(without.code, 0, 'it is no fault')
  t.match(without.stdout, /^-- +cuda +CUDA backend unavailable: there is no \/nowhere\/lib\.so/m)
  if (!simt) return
  // the emulator in place of the CUDA library
  process.env.ROPEWALK_CUDA_LIBRARY = simt
  process.env.ROPEWALK_SIMT_MACHINE = 'devices=2,memory=1073741824'
  const { code, stdout } = await ropewalk('doctor')
  t.equal(code, 0)
  t.match(stdout, /^ok +cuda +.*, sm_80 \(kernels of sm_80\), 1\.0 GiB, 1\.0 GiB free$/m)
  t.match(stdout, /^ok +cuda:1 +.*sm_80/m)
  t.match(stdout, /^ok +self-check +matmul 37x53x29 on cuda: largest error/m)
})

t.test('device auto says why it is the CPU, device cpu does not', async (t) => {
  const { ROPEWALK_CUDA_LIBRARY: before } = process.env
  t.teardown(() => {
    if (before === undefined) delete process.env.ROPEWALK_CUDA_LIBRARY
    else process.env.ROPEWALK_CUDA_LIBRARY = before
  })
  process.env.ROPEWALK_CUDA_LIBRARY = '/nowhere/lib.so'
  const args = ['generate', model, '--prompt', 'the', '--max-tokens', '1']
  const auto = await ropewalk(...args)
  t.match(auto.stderr, /^on the CPU: CUDA backend unavailable: there is no \/nowhere\/lib\.so, [^\n]*\n/)
  const cpu = await ropewalk(...args, '--device', 'cpu')
  t.strictSame([auto.code, cpu.code, cpu.stderr], [0, 0, ''])
})

t.test('inspect', async (t) => {
  const { code, stdout } = await ropewalk('inspect', model)
  t.equal(code, 0)
  t.match(stdout, /positions +linear, theta 10000, factor 4/)
  t.match(stdout, /model\.safetensors, \d+ bytes/)
  const report = JSON.parse((await ropewalk('inspect', model, '--json')).stdout)
  t.match(report, { dtype: 'float32', contextWindow: 128, config: { layers: 2, rope: { type: 'linear', factor: 4 } } })
  const count = report.parameters.reduce(
    (n: number, { dims }: { dims: number[] }) => n + dims.reduce((a, b) => a * b),
    0,
  )
  t.equal(count, report.parameterCount)
  t.equal(report.tokenizer.vocabSize <= 400, true)

  const bare = join(dir, 'bare')
  cpSync(model, bare, { recursive: true })
  rmSync(join(bare, 'tokenizer.json'))
  t.match((await ropewalk('inspect', bare)).stdout, /unusual +no tokenizer/)
  t.match(reason(await ropewalk('generate', bare, '--prompt', 'x')), /no tokenizer\.json/)
})

t.test('a model is extended, evaluated and used', async (t) => {
  const out = join(dir, 'extended')
  const args = ['extend', model, '--context', '512', '--data', text, '--out', out, '--steps', '3', '--lr', '1e-3']
  const { code, stdout, stderr } = await ropewalk(...args, '--json', '--validation', '1', '--eval-every', '2')
  t.equal(code, 0, stderr)
  const events = stdout
    .trimEnd()
    .split('\n')
    .map((line) => JSON.parse(line))
  t.same(
    events.map(({ event, step }) => step ?? event),
    [1, 2, 3, 'saved'],
  )
  t.ok(events[0].loss > 0 && events[2].learningRate > 0)
  t.match(events[3], { out, contextWindow: 512, steps: 3 })
  t.match(stderr, /step 1\/3 loss .* left\n.*step 3\/3 loss/s, 'a line a step')
  t.ok(existsSync(join(`${out}.checkpoints`, 'checkpoint-000003')))

  const again = await ropewalk(...args)
  t.equal(again.code, 1)
  t.match(reason(again), `${out}`, 'an existing folder is refused before anything is done')

  const seen = JSON.parse((await ropewalk('inspect', out, '--json')).stdout)
  t.match(seen, { contextWindow: 512, config: { rope: { type: 'linear', factor: 16 } } })

  const windows = ['eval', 'perplexity', out, '--data', text, '--windows', '128,512', '--baseline']
  const report = JSON.parse((await ropewalk(...windows, '--json', '--no-bos')).stdout)
  t.same(
    [report.results, report.baseline].map((list) => list.map(({ window }: { window: number }) => window)),
    [
      [128, 512],
      [128, 512],
    ],
  )
  t.not(report.results[0].nll, report.baseline[0].nll)
  const table = await ropewalk(...windows, '--truncate', '600', '--stride', '100')
  t.equal(table.code, 0)
  t.match(table.stdout, /window +stride.*\nmodel +128.*\nmodel +512.*\nbaseline +128.*\nbaseline +512/)
  t.match(table.stderr, /baseline, window 512 \d+\/\d+ perplexity/)

  const passkey = ['eval', 'passkey', out, '--distances', '2', '--trials', '1', '--baseline']
  t.match(
    (await ropewalk(...passkey)).stdout,
    /distance +tokens +accuracy +baseline\n +256 .*\n +512 .*\nmodel: kmax 0 of 512/,
  )
  t.match(JSON.parse((await ropewalk(...passkey, '--json')).stdout), {
    result: { kmax: 0 },
    baseline: { context: 512 },
  })

  const prompt = ['generate', out, '--prompt', 'the rope', '--max-tokens', '5']
  const written = JSON.parse((await ropewalk(...prompt, '--json')).stdout)
  t.ok(written.ids.length <= 5)
  t.equal((await ropewalk(...prompt)).stdout, `${written.text}\n`)
  const sampled = () =>
    ropewalk(...prompt, '--json', '--temperature', '1', '--top-k', '50', '--top-p', '0.9', '--seed', '3')
  t.same(await sampled(), await sampled(), 'the same seed writes the same text')
})

t.test('positions alone are rewritten with --steps 0', async (t) => {
  const base = join(fixtures, 'mha-f32')
  const window = JSON.parse((await ropewalk('inspect', base, '--json')).stdout).contextWindow
  for (const method of ['linear', 'ntk', 'dynamic', 'yarn', 'llama3']) {
    const out = join(dir, `positions-${method}`)
    const context = String(window * 3 + 1)
    const { code, stderr } = await ropewalk(
      'extend',
      base,
      '--context',
      context,
      '--steps',
      '0',
      '--method',
      method,
      '--out',
      out,
    )
    t.equal(code, 0, stderr)
    const { contextWindow } = JSON.parse((await ropewalk('inspect', out, '--json')).stdout)
    t.ok(contextWindow >= window * 3 + 1 && contextWindow <= window * 3 + 2, `${method}: window ${contextWindow}`)
  }
  const out = join(dir, 'positions-linear')
  const replaced = await ropewalk(
    'extend',
    base,
    '--context',
    String(window * 2),
    '--steps',
    '0',
    '--out',
    out,
    '--overwrite',
  )
  t.equal(replaced.code, 0, replaced.stderr)
  const onTop = await ropewalk(
    'extend',
    out,
    '--context',
    String(window * 4),
    '--steps',
    '0',
    '--method',
    'yarn',
    '--out',
    `${out}2`,
  )
  t.match(reason(onTop), /cannot be put on top/)
})

/** A process of the compiled command, and what it has written. */
function start(...args: string[]) {
  const child = spawn(process.execPath, [join(root, 'dist/cli/main.js'), ...args])
  const written = { stdout: '', stderr: '' }
  for (const name of ['stdout', 'stderr'] as const) {
    child[name].setEncoding('utf8').on('data', (part: string) => (written[name] += part))
  }
  const ended = new Promise<number | null>((resolve) => child.on('close', resolve))
  return { child, ended, stdout: () => written.stdout, stderr: () => written.stderr }
}

async function until(condition: () => boolean): Promise<void> {
  for (let i = 0; i < 600 && !condition(); i++) await new Promise((resolve) => setTimeout(resolve, 50))
}

t.test('a signal ends a run after its step, and the printed command goes on', async (t) => {
  const out = join(dir, 'interrupted')
  mkdirSync(join(dir, 'a folder'))
  const data = join(dir, 'a folder', "it's text.txt")
  cpSync(text, data)
  const args = [
    'extend',
    model,
    '--context',
    '256',
    '--data',
    data,
    '--out',
    out,
    '--steps',
    '100000',
    '--threads',
    '1',
  ]
  const first = start(...args)
  await until(() => /step 2\//.test(first.stderr()))
  first.child.kill('SIGINT')
  t.equal(await first.ended, 130, first.stderr())
  const [, stopped] = /stopped after step (\d+) of 100000, saved in .*\.checkpoints/.exec(first.stderr()) ?? []
  t.ok(Number(stopped) >= 2)
  const command = first.stderr().trimEnd().split('\n').at(-1)!
  t.match(command, /^ropewalk extend .* --resume .*'.*a folder\/it'\\''s text\.txt'.* --steps 100000/)
  t.notOk(existsSync(out), 'no model before the run is done')

  const second = start(...args, '--resume')
  await until(() => / step \d+\/|^step \d+\//m.test(second.stderr()))
  second.child.kill('SIGTERM')
  t.equal(await second.ended, 143, second.stderr())
  t.match(second.stderr(), `step ${Number(stopped) + 1}/100000`, 'the next step comes first')
})

t.test('a reader of stdout that goes away ends a run as a signal does', async (t) => {
  const out = join(dir, 'unread')
  const options = ['--context', '256', '--data', text, '--out', out, '--steps', '100000', '--threads', '1', '--json']
  const run = start('extend', model, ...options)
  await until(() => /"step":2,/.test(run.stdout()))
  run.child.stdout.destroy()
  t.equal(await run.ended, 130, run.stderr())
  t.match(run.stderr(), /stopped after step \d+ of 100000, saved in .*\.checkpoints/)
})

t.test('the compiled command', async (t) => {
  const good = start('--version')
  t.equal(await good.ended, 0)
  const bad = start('inspect', join(dir, 'missing'))
  t.equal(await bad.ended, 1)
  t.match(bad.stderr(), /^ropewalk: .*missing: no such folder[^\n]*\n$/)

  process.env.PREBUILDS_ONLY = '1' // what was built here is passed over
  const broken = start('doctor')
  delete process.env.PREBUILDS_ONLY
  t.equal(await broken.ended, existsSync(join(root, 'prebuilds', 'SHA256SUMS')) ? 0 : 1)
  if (!existsSync(join(root, 'prebuilds', 'SHA256SUMS'))) {
    t.match(broken.stdout(), /BAD addon +no native addon for .*\nnot ready: addon\. Next: npx ropewalk build/s)
  }
})

t.test('a bar on a terminal, lines elsewhere', async (t) => {
  const written: string[] = []
  const stderr = { write: (part: string) => written.push(part), isTTY: true, columns: 60 }
  const bar = new Output(stderr, stderr, true).progress('step', 4)
  bar.update(1, 'loss 3')
  bar.update(4, 'loss 2')
  bar.end()
  t.match(written[0], /^\rstep \[#{6}-{18}\] 1\/4 loss 3, \d+ s left$/)
  t.match(written[1], /^\rstep \[#{24}\] 4\/4 loss 2 +$/)
  t.match(written[2], /^\r +\r$/)
  t.ok(written.every((part) => part.length <= 61))

  const lines: string[] = []
  const plain = { write: (part: string) => lines.push(part) }
  const tenths = new Output(plain, plain, false).progress('windows', 100)
  for (let i = 1; i <= 100; i++) tenths.update(i)
  t.equal(lines.length, 10)

  t.same([0.2, 59, 90, 3725].map(formatDuration), ['1 s', '59 s', '2 min', '1 h 2 min'])
  t.same([0, 1.23456, 12345.678, 0.00012, 1.5e9].map(formatNumber), ['0', '1.235', '12346', '1.200e-4', '1.500e+9'])
})
