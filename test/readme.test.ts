// The README's examples are run as they stand there, with smaller numbers and a small model in the place of theirs.
import { type ChildProcess, spawn } from 'node:child_process'
import { cp, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'
import { fixtures } from './golden.js'

const root = fileURLToPath(new URL('..', import.meta.url))
const readme = await readFile(join(root, 'README.md'), 'utf8')
const blocks = [...readme.matchAll(/^```(\w*)\n([\s\S]*?)^```$/gm)].map(([, language, code]) => ({
  language,
  code: code!,
}))
const small = (code: string): string => code.replaceAll('8192', '512').replaceAll('steps: 1000', 'steps: 3')

// Inside the package, so that `ropewalk` means this one.
await mkdir(join(root, '.tap'), { recursive: true })
const place = await mkdtemp(join(root, '.tap', 'readme-'))
t.teardown(() => rm(place, { recursive: true, force: true }))
await cp(join(fixtures, 'gqa-linear4-f32'), join(place, 'llama'), { recursive: true })
const text = (await readFile(join(root, 'LICENSE'), 'utf8')).repeat(3)
await writeFile(join(place, 'books.jsonl'), `${JSON.stringify({ text })}\n${JSON.stringify({ text })}\n`)

function start(args: string[]): ChildProcess & { output: Promise<{ code: number | null; text: string }> } {
  const child = spawn(process.execPath, args, {
    cwd: place,
    env: { ...process.env, XDG_CACHE_HOME: join(place, 'cache') },
  })
  let said = ''
  child.stdout.on('data', (piece) => (said += piece))
  child.stderr.on('data', (piece) => (said += piece))
  const output = new Promise<{ code: number | null; text: string }>((done) =>
    child.on('close', (code) => done({ code, text: said })),
  )
  return Object.assign(child, { output })
}

async function script(name: string, code: string): Promise<string> {
  const typescript = (await import('typescript')).default
  const compilerOptions = { module: typescript.ModuleKind.ESNext, target: typescript.ScriptTarget.ES2022 }
  const file = join(place, name)
  await writeFile(file, typescript.transpileModule(small(code), { compilerOptions }).outputText)
  return file
}

t.test('from the shell', async (t) => {
  const [line] = readme.match(/^npx ropewalk extend .*$/m)!
  const args = small(line).replace('--steps 1000', '--steps 2').split(' ').slice(2)
  const { code, text } = await start([join(root, 'dist', 'cli', 'main.js'), ...args, '--device', 'cpu']).output
  t.equal(code, 0, text)
  t.match(text, /saved \.\/llama-8k/)
  t.match(JSON.parse(await readFile(join(place, 'llama-8k', 'config.json'), 'utf8')), { max_position_embeddings: 512 })
  await rm(join(place, 'llama-8k'), { recursive: true })
})

const typescript = blocks.filter(({ language }) => language === 'ts').map(({ code }) => code)

t.test('the first example', async (t) => {
  const code = typescript.find((block) => block.includes('for await (const { step, loss'))!
  t.ok(code.trim().split('\n').length <= 12, 'fits into twelve lines')
  const { code: exit, text } = await start([await script('first.mjs', code)]).output
  t.equal(exit, 0, text)
  t.match(text, /^3 \d+\.\d{4} \d+ tokens\/s$/m)
})

t.test('embedding', async (t) => {
  const code = typescript.find((block) => block.includes('model.gradients'))!
  const { code: exit, text } = await start([
    await script('embed.mjs', `${code}\nconsole.log('dims', dims.join(), data.length)`),
  ]).output
  t.equal(exit, 0, text)
  t.match(text, /dims 1,3,400 1200/)
})

t.test('server', async (t) => {
  const code = typescript.find((block) => block.includes('createServer'))!
  const port = 20000 + (process.pid % 20000)
  const server = start([
    await script('server.mjs', code.replace('8080', String(port)).replace('steps: 1000', 'steps: 400')),
  ])
  t.teardown(() => server.kill('SIGKILL'))
  const visit = async (signal?: AbortSignal): Promise<Response> => {
    for (let attempt = 0; ; attempt++) {
      try {
        return await fetch(`http://127.0.0.1:${port}/`, signal ? { signal } : {})
      } catch (error) {
        if (server.exitCode !== null) throw new Error((await server.output).text)
        if (attempt === 100) throw error
        await new Promise((later) => setTimeout(later, 100))
      }
    }
  }
  const leaving = new AbortController()
  const events = (await visit(leaving.signal)).body!.pipeThrough(new TextDecoderStream()).getReader()
  let seen = ''
  while (!/"step":3\b/.test(seen)) seen += (await events.read()).value ?? t.bailout('the stream ended')
  leaving.abort()
  t.match(seen, /^data: {"step":1,"loss":\d/)
  await events.cancel().catch(() => undefined)

  // Once the run is saved, the next visit goes on behind what was seen.
  const pause = () => new Promise((later) => setTimeout(later, 100))
  const saved = async () => (await readdir(join(place, 'run'))).some((name) => /^checkpoint-\d+$/.test(name))
  for (let attempt = 0; attempt < 300 && !(await saved()); attempt++) await pause()
  let next = ''
  for (let attempt = 0; attempt < 50 && !/"step":\d+/.test(next); attempt++) {
    await pause()
    const again = new AbortController()
    const reader = (await visit(again.signal)).body!.pipeThrough(new TextDecoderStream()).getReader()
    next = (await reader.read()).value ?? ''
    again.abort()
    await reader.cancel().catch(() => undefined)
  }
  const step = Number(/"step":(\d+)/.exec(next)?.[1])
  t.ok(step > 3, `went on at step ${step}`)
  t.equal(server.exitCode, null, 'and the server lives')
})
